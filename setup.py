"The package as `settings.ini` describes it."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

cp = ConfigParser(delimiters=['=']); cp.read('settings.ini', encoding='utf8')
cfg = cp['DEFAULT']
reqs,dev = cfg['requirements'].split(),cfg['dev_requirements'].split()
extras = {k.removeprefix('extra_'): v.split() for k,v in cfg.items() if k.startswith('extra_')}
extras['dev'] = dev + sum(extras.values(), [])

setup(name=cfg['lib_name'], version=cfg['version'], license='Apache-2.0', description=cfg['description'],
      long_description=Path('README.md').read_text(encoding='utf8'), long_description_content_type='text/markdown',
      author=cfg['author'], url=cfg['git_url'] or None, keywords=cfg['keywords'].split(),
      classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Programming Language :: Python :: 3'],
      packages=find_packages(include=['pipa', 'pipa.*']), include_package_data=True, zip_safe=False,
      python_requires='>='+cfg['min_python'], install_requires=reqs, extras_require=extras,
      entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d']})
