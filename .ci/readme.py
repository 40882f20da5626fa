"Make README.md from nbs/index.ipynb: `python .ci/readme.py`"
import posixpath, re
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def render(nb): # Path of the notebook
    "The notebook as Markdown whose links start from the root"
    from nbconvert import MarkdownExporter
    import nbformat
    nb = nbformat.read(nb, 4)
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*hide\b', c.source, re.M)]
    for c in nb.cells:
        if c.cell_type=='code': c.source = '' if re.search(r'^#\|\s*echo:\s*false', c.source, re.M) else re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
    md,_ = MarkdownExporter().from_notebook_node(nb)
    md = re.sub(r'```python\s*```\n', '', md)
    here = lambda m: f'{m[1]}{m[2] if re.match(r"(https?|mailto):|#", m[2]) else posixpath.normpath(f"nbs/{m[2]}")}{m[3]}'
    md = re.sub(r'(\]\()([^)\s]+)(\))', here, md)
    return '<!-- Made from nbs/index.ipynb by .ci/readme.py: edit that, not this. -->\n\n' + re.sub(r'\n{3,}', '\n\n', md).strip() + '\n'


if __name__=='__main__': (root/'README.md').write_text(render(root/'nbs/index.ipynb'), encoding='utf8')
