"Run nbs/index.ipynb and make README.md from it: `python .ci/readme.py`"
import posixpath, re
from pathlib import Path
import nbformat

root = Path(__file__).resolve().parents[1]


def has(cell, directive): return cell.cell_type=='code' and re.search(rf'^#\|\s*{directive}\b', cell.source, re.M)

def run(path): # Path of the notebook, which gets the new outputs
    "Run all cells but those that ask not to"
    from nbclient import NotebookClient
    from nbdev.clean import nbdev_clean
    nb = nbformat.read(path, 4)
    todo = [c for c in nb.cells if not has(c, 'eval: *false')]
    NotebookClient(nbformat.v4.new_notebook(cells=todo), kernel_name='python3', resources=dict(metadata=dict(path=str(path.parent)))).execute()
    nbformat.write(nb, path)
    nbdev_clean.__wrapped__(str(path))


def render(path): # Path of the notebook
    "The notebook as Markdown whose links start from the root"
    from nbconvert import MarkdownExporter
    nb = nbformat.read(path, 4)
    nb.metadata.language_info = dict(name='python')
    nb.cells = [c for c in nb.cells if not has(c, 'hide')]
    for c in nb.cells:
        if c.cell_type=='code': c.source = '' if has(c, 'echo: *false') else re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
    md,_ = MarkdownExporter().from_notebook_node(nb)
    def from_root(m): return m[1] + (m[2] if re.match('https?:|#', m[2]) else posixpath.normpath(f'nbs/{m[2]}')) + ')'
    md = re.sub(r'(\]\()([^)\s]+)\)', from_root, re.sub(r'```python\s*```\n', '', md))
    return '<!-- Made from nbs/index.ipynb by .ci/readme.py: edit that, not this. -->\n\n' + re.sub(r'\n{3,}', '\n\n', md).strip() + '\n'


if __name__=='__main__':
    index = root/'nbs/index.ipynb'
    run(index)
    (root/'README.md').write_text(render(index), encoding='utf8')
