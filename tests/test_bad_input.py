"A table of wrong input: each row ends in one sentence that names the thing and the cure, a status other than zero, and nothing half-written"
import errno, io, os, pickle, re, shutil
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from fastcore.script import anno_parser
from safetensors.torch import save_file
from pipa.bench import parts
from pipa.runs import plan
from pipa import check, cli, data, infer, labels, learner
from pipa.checkpoints import load, save
from pipa.labels import label_space, space
from pipa.models import daformer, light
from tiny import city

codes = space('minicity').codes
tiny = ['--epochs=1', '--unlabelled=0', '--steps=1', '--bs=2', '--size=64x64', '--crop=64x64', '--start=0', '--workers=0']

# --- a world of broken things, made once ------------------------------------------------------------------------------------------------
def folder_of(home, n=2):
    "A folder as the manual describes it"
    city(home, n=n, size=(64,64))
    for a,b in (('game','source'), ('real','target')): (home/a).rename(home/b)
    shutil.copytree(home/'target', home/'valid')
    (home/'codes.txt').write_text('\n'.join(codes))
    return home

def png(a, file): file.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(np.asarray(a)).save(file); return file
def cut(file, n): file.write_bytes(file.read_bytes()[:n])
def again(f, g): y = np.array(Image.open(f)); f.unlink(); return png(g(y), f)

class Bomb:
    def __reduce__(self): return os.system, ('touch boom',)

breaks = dict(
    no_codes=lambda d: (d/'codes.txt').unlink(), empty_codes=lambda d: (d/'codes.txt').write_text('\n\n'),
    twice_codes=lambda d: (d/'codes.txt').write_text('\n'.join([*codes[:-1], codes[0]])), few_codes=lambda d: (d/'codes.txt').write_text('sky\nroad\n'),
    one_code=lambda d: (d/'codes.txt').write_text('road\n'), latin_codes=lambda d: (d/'codes.txt').write_bytes('straße\nmüll\n'.encode('latin1')),
    picture_codes=lambda d: shutil.copy(d/'source/images/0.png', d/'codes.txt'), many_codes=lambda d: (d/'codes.txt').write_text('\n'.join(f'c{i}' for i in range(300))),
    no_source=lambda d: shutil.rmtree(d/'source/images'), no_masks=lambda d: shutil.rmtree(d/'source/masks'),
    no_target=lambda d: shutil.rmtree(d/'target'), no_pictures=lambda d: [p.unlink() for p in (d/'target/images').iterdir()],
    other_endings=lambda d: [p.rename(p.with_suffix('.gif')) for p in (d/'source/images').iterdir()],
    mask_lost=lambda d: (d/'source/masks/1.png').unlink(), mask_other_name=lambda d: (d/'source/masks/1.png').rename(d/'source/masks/1_label.png'),
    mask_size=lambda d: again(d/'source/masks/1.png', lambda y: y[:32]), mask_value=lambda d: again(d/'source/masks/1.png', lambda y: y+20),
    mask_rgb=lambda d: again(d/'source/masks/1.png', lambda y: np.stack([y]*3, -1)), mask_255=lambda d: [again(p, lambda y: np.where(y>4, 255, 0).astype(np.uint8)) for p in (d/'source/masks').iterdir()],
    mask_void=lambda d: [again(p, lambda y: np.full_like(y, 255)) for p in (d/'source/masks').iterdir()],
    mask_from_1=lambda d: [again(p, lambda y: y+1) for p in (d/'source/masks').iterdir()],
    mask_float=lambda d: (Image.fromarray(np.full((64,64), .5, np.float32)).save(d/'source/masks/1.tif'), (d/'source/masks/1.png').unlink()),
    mask_cut=lambda d: cut(d/'source/masks/1.png', -40), mask_empty=lambda d: (d/'source/masks/1.png').write_bytes(b''),
    mask_folder=lambda d: ((d/'source/masks/1.png').unlink(), (d/'source/masks/1.png').mkdir()),
    image_empty=lambda d: (d/'source/images/1.png').write_bytes(b''), image_html=lambda d: (d/'target/images/1.png').write_text('<html>Sign in</html>'),
    target_empty=lambda d: (d/'target/images/1.png').write_bytes(b''), target_loop=lambda d: ((d/'target/images/1.png').unlink(), (d/'target/images/1.png').symlink_to('1.png')),
    target_gone=lambda d: ((d/'target/images/1.png').unlink(), (d/'target/images/1.png').symlink_to('moved.png')),
    image_cut=lambda d: cut(d/'source/images/1.png', -400), target_cut=lambda d: [cut(p, -400) for p in (d/'target/images').iterdir()],
    jpg_cut=lambda d: [(Image.open(p).save(p.with_suffix('.jpg')), p.unlink(), cut(p.with_suffix('.jpg'), -300)) for p in [*(d/'target/images').iterdir()]],
    valid_no_masks=lambda d: shutil.rmtree(d/'valid/masks'), valid_mask_lost=lambda d: (d/'valid/masks/1.png').unlink(),
    valid_value=lambda d: again(d/'valid/masks/1.png', lambda y: y+20), valid_size=lambda d: again(d/'valid/masks/1.png', lambda y: y[:32]),
    valid_cut=lambda d: cut(d/'valid/images/1.png', -400))

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    w = tmp_path_factory.mktemp('world')
    folder_of(w/'good')
    for k,f in breaks.items(): f(Path(shutil.copytree(w/'good', w/k, symlinks=True)))
    torch.manual_seed(0)
    net,sp = light('mit_b0', n_out=len(codes)),space('minicity')
    save(w/'w.safetensors', net, sp, size='64x64', which='student'); save(w/'no_classes.safetensors', net); save(w/'no_size.safetensors', net, sp)
    save(w/'b1.safetensors', light('mit_b1', n_out=len(codes)), sp, size='64x64'); save(w/'three.safetensors', light('mit_b0', n_out=3), label_space(['a','b','c']), size='64x64')
    save(w/'format9.safetensors', net, sp, pipa_format=9); save(w/'other.safetensors', net, sp, spec=dict(make='transformer_xxl'))
    b = (w/'w.safetensors').read_bytes()
    (w/'cut.safetensors').write_bytes(b[:len(b)//2]); (w/'head.safetensors').write_bytes(b[:100]); (w/'zero.safetensors').write_bytes(b'')
    (w/'flip.safetensors').write_bytes(b[:-1000]+bytes([b[-1000]^1])+b[-999:])
    (w/'page.pth').write_text('<!DOCTYPE html><html>Quota exceeded</html>'); (w/'bomb.pth').write_bytes(pickle.dumps(Bomb()))
    torch.save(dict(state_dict=net.state_dict(), extra=Bomb()), w/'bomb2.pth'); torch.save(net.state_dict(), b := io.BytesIO()); (w/'cut.pth').write_bytes(b.getvalue()[:-5000])
    save_file({'x': torch.ones(2)}, w/'strange.safetensors'); torch.save(net, w/'whole.pth'); (w/'bad.onnx').write_bytes(b'not a graph')
    (w/'empty').mkdir(); (w/'texts').mkdir(); (w/'texts/a.txt').write_text('no picture'); (w/'file').write_text('a file')
    (w/'mixed').mkdir(); png(np.zeros((64,64,3), np.uint8), w/'mixed/good.png'); (w/'mixed/bad.png').write_bytes(b'no picture')
    png(np.zeros((64,64,3), np.uint8), w/'pics/a.png'); (w/'config').mkdir(); (w/'json').mkdir(); shutil.copy(w/'strange.safetensors', w/'json/model.safetensors')
    for o in ('config', 'json'): (w/o/'config.json').write_text('{"method": ')
    dls = data.uda_dls(*[data.folder(w/f'good/{o}/images', w/f'good/{o}/masks', codes) for o in ('source', 'target')], bs=1, n=1, size=(64,64), device='cpu')
    learner.uda_learner(dls, net, 'source', path=w).export('export.pkl')
    (w/'table.csv').write_text('<html>'); (w/'three.txt').write_text('a\nb\nc\n')
    return w

@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg')); monkeypatch.setenv('PIPA_DATA', str(tmp_path/'nothing'))
    monkeypatch.delenv('PIPA_DEBUG', raising=False)
    (tmp_path/'here').mkdir(); monkeypatch.chdir(tmp_path/'here')

def shell(name, *args):
    "A command as the shell calls it, without the start of a process"
    f = getattr(parts if name=='pipa_bench' else cli, name).__wrapped__
    o = vars(anno_parser(f, name).parse_args([*map(str, args)]))
    return f(**{k:v for k,v in o.items() if k not in ('pdb', 'xtra')})

def tree(*homes): return {str(p): p.stat(follow_symlinks=False).st_mtime_ns for h in homes for p in sorted(h.rglob('*')) if not p.is_dir()}


# --- commands ---------------------------------------------------------------------------------------------------------------------------
# A row: arguments, and words of the sentence. `{w}` is the world above; what a row doesn't say is as in `usual`.
usual = dict(pipa_train=[*tiny, '--data={w}/good', '--out=out'], pipa_eval=['{w}/w.safetensors', '--data={w}/good', '--out=out'], pipa_predict=['{w}/pics', '--weights={w}/w.safetensors', '--out=out'],
             pipa_convert=['{w}/w.safetensors', '--out=out'], pipa_export=['{w}/w.safetensors', '--out=out.pt2'], pipa_study=['--table=out/t.csv', '--runs=out/r'], pipa_check=['{w}/good', '--out=out', '--workers=0'],
             pipa_suggest=['{w}/good', '--weights={w}/w.safetensors', '--out=out'],
             pipa_bench=['--parts=ema,optimizer', '--out=out.csv'])

table = dict(pipa_train=r"""
--method=pippa | no method `pippa`: choose one of
--method= | no method ``: choose
--method=pipa+pippa | no method `pippa`
--terms=all | no terms `all`: choose none, pixel
--data=nowhere | `--data nowhere` is neither
--data= | is neither `minicity` nor a folder
--data={w}/file | is neither
--data=C:\data\city | `--data C:\\data\\city` is neither `minicity` nor a folder that is there
--data=C: | nor a folder that is there
--data=s3://bucket/city | nor a folder that is there
--data=~nobody-of-this-name/x | nobody knows which home folder the tilde means
--data=gta5:cityscapes | `gta5`, which is no data set
--data=gta:cityscapes | set PIPA_DATA
--hints=nowhere | no `nowhere`, where hints should be
--hints={w}/empty | `--hints {w}/empty` holds no hint
--hints={w}/file | none of what is read as a hint
--seed=abc | argument --seed: invalid int
--seed=-1 | `--seed` is -1: it must be from 0
--minutes=-1 | `--minutes` is -1
--seed=99999999999 | `--seed` is 99999999999
--epochs=0 | `--epochs` is 0: it must be from 1 to 1000000
--epochs=10000000000000 | `--epochs` is 10000000000000: it must be from 1
--epochs=1.5 | --epochs: invalid int
--steps=0 | `--steps` is 0
--steps=-2 | `--steps` is -2
--steps=10000000000000 | `--steps` is 10000000000000: it must be from 1 to 1000000
--bs=0 | `--bs` is 0
--bs=-1 | `--bs` is -1
--bs=10000000000000 | `--bs` is 10000000000000: it must be from 1 to 100000
--size=9999968x64 | `--size 9999968x64`: a side has 32768 pixels at most
--size=100x100 | both sides must be multiples of 32
--size=64 | write it as 128x256
--size=0x0 | at least 64
--size=-64x64 | at least 64
--net=resnet | no net `resnet`: choose one of light
--arch=mit_b9 | No encoder is named 'mit_b9': choose one of
--encoder={w}/nofile.pth | no file `{w}/nofile.pth`: check the path
--encoder={w}/page.pth | page.pth` is a web page .* download the file itself
--encoder={w}/cut.safetensors | cut off .*: copy it again
--encoder={w}/b1.safetensors | looks like mit\('mit_b1'\), your net like mit\('mit_b0'\)
--encoder={w}/bomb.pth | bomb.pth` is not a file of weights
--encoder={w}/bomb2.pth | asks for `posix.system`.* not opened
--encoder={w}/empty | none of the files weights.safetensors
--pretrained | weights of mit_b0 are neither here .* save it as
--lr=-1 | `lr` is -1.0: it must be more than 0
--lr=0 | `lr` is 0
--lr=nan | `lr` is nan
--alpha=1.5 | `alpha` is 1.5: it must be from 0 to 1
--alpha=-.1 | `alpha` is -0.1
--trust=pixels | `trust` is 'pixels': choose one of batch
--thresh=1.5 | `thresh` is 1.5
--start=-1 | `start` is -1
--pixel=-.1 | `w_pixel` is -0.1
--patch=nan | `w_patch` is nan
--method=minent --weight=-1 | `weight` is -1
--crop=63x63 | `--crop 63x63`: both sides
--crop=128x128 | doesn't fit into `--size 64x64`: give a smaller crop
--temp=0 | `temp` is 0.0: it must be more than 0
--form=other | `form` is 'other': choose one of released
--preset=foo | no preset `foo`: choose one of daformer
--rcs=-1 | `--rcs` is -1
--zoom=.5 | `--zoom` is 0.5: it must be from 1 to 100
--zoom=1e300 | `--zoom` is 1e\+300: it must be from 1 to 100
--zoom=inf | `--zoom` is inf
--workers=-1 | `--workers` is -1
--workers=9999999999 | `--workers` is 9999999999: it must be from 0 to 1024
--threads=-1 | `--threads` is -1
--threads=9999999999 | `--threads` is 9999999999
--unlabelled=-1 | `--unlabelled` is -1
--out={w}/file | is a file: name a folder
--out={w}/file/x | `{w}/file` is not a folder, so
--out=~nobody-of-this-name/x | nobody knows which home
--nothing=1 | unrecognized arguments: --nothing=1
--switch=temp=.1 | unrecognized arguments: --switch=temp=.1
no_codes | has no `codes.txt`: write the class names
empty_codes | codes.txt` is empty: write the class names
twice_codes | codes.txt`: codes: sky appears more than once
few_codes | holds the value .* List every class
one_code | codes.txt`: no label space 'road'.* two lines or more
many_codes | codes.txt`: codes: 300 classes
latin_codes | codes.txt` is no text in UTF-8
picture_codes | codes.txt` is no text in UTF-8
no_source | source/images` is not a folder: give
no_masks | source/masks` is not a folder
no_target | target/images` is not a folder
no_pictures | No picture .* is it the right folder
other_endings | No picture .* in `{w}/other_endings/source/images`
mask_lost | 1 of 2 images have no mask .*images/1.png
mask_other_name | same name as its image
mask_size | is 64x64, but its mask `.*1.png` is 32x64: bring both
mask_value | 1.png` holds the value 20, but
mask_rgb | 1.png` has 3 channels, .* Save the class numbers
mask_255 | nothing but 0 and 255.* divide the masks by 255
mask_void | No class has a pixel .* all masks empty
mask_from_1 | numbered from 1: subtract 1
mask_float | 1.tif` holds float32: a mask holds whole numbers
mask_cut | 1.png` can't be read as a mask .*: it may be cut off
mask_empty | 1.png` can't be read as a mask
mask_folder | 1 of 2 images have no mask
image_empty | source/images/1.png` can't be read as a picture
image_html | target/images/1.png` can't be read as a picture
target_empty | target/images/1.png` can't be read
target_loop | target/images/1.png`: It is a link that leads back to itself: remove it
target_gone | target/images/1.png` is listed but not there: was it moved
target_cut | target/images/0.png` can't be read as a picture .*: it may be cut off.* 1 more of `target` can't be read: `pipa_check` lists them
jpg_cut | target/images/0.jpg` can't be read as a picture .*: it may be cut off
image_cut | source/images/1.png` can't be read as a picture .*: it may be cut off
--method=self_training --weight=5 | `--weight 5.0` would do nothing: the method `self_training` has no term for it. Leave it out, or name
--method=source --pixel=1 | `--pixel 1.0` would do nothing: the method `source`
--method=mic+pixel --patch=.5 | `--patch 0.5` would do nothing: the method `mic\+pixel`
--method=pixel --patch=.2 | `--patch 0.2` would do nothing: the method `pixel`
--method=source --weight=1 --temp=.5 | `--weight 1.0`, `--temp 0.5` would do nothing
valid_no_masks | valid/masks` is not a folder
valid_mask_lost | 1 of 2 images have no mask in `{w}/valid_mask_lost/valid/masks`
valid_value | valid/masks/1.png` holds the value 20
valid_size | valid/masks/1.png` is 32x64: bring both
valid_cut | valid/images/1.png` can't be read as a picture
""", pipa_eval="""
{w}/nofile | no file `{w}/nofile`: check the path
{w}/page.pth | is a web page
{w}/head.safetensors | cut off .*: copy it again
{w}/zero.safetensors | cut off .*: copy it again
{w}/flip.safetensors | is damaged, .*: copy it again
{w}/cut.pth | cut off .*: copy it again
{w}/bomb2.pth | not opened
{w}/strange.safetensors | look like nothing that is known here: build a net
{w}/whole.pth | asks for `pipa.models.SegNet`
{w}/bad.onnx | bad.onnx` can't be opened
{w}/no.onnx | no file `{w}/no.onnx`
{w}/no_classes.safetensors | doesn't say what its classes are: save it again
{w}/format9.safetensors | update pipa
{w}/other.safetensors | transformer_xxl.*update
{w}/three.safetensors | knows a, b, c; the masks have sky
{w}/empty | no file `{w}/empty/weights.safetensors`
{w}/config | none of the files
{w}/json | config.json` is no JSON
{w}/pics/a.png | not a file of weights
{w}/export.pkl | learner that fastai pickled.* not opened: take `weights.safetensors`
--teacher | no file `{w}/teacher.safetensors`
--mode=other | `--mode` is 'other': choose one of whole, slide
--crop=64x64 | add `--mode slide`
--mode=slide --crop=33x33 | `--crop 33x33`: both sides
--mode=slide --stride=0x0 | `--stride 0x0`
--mode=slide --stride=128x128 | would leave gaps
--size=33x33 | multiples of 32
--bs=0 | `--bs` is 0: it must be from 1
--bs=10000000000000 | `--bs` is 10000000000000
--images={w}/pics | belong together: give both
--images={w}/pics --masks={w}/empty | No picture .* in `{w}/empty`
--images={w}/pics --masks={w}/pics | given for the images and for their masks
--codes={w}/three.txt | the masks have a, b, c
--codes=nothing | no label space 'nothing', there are cityscapes
--data=nowhere | `--data nowhere` is neither
--data=cityscapes | set PIPA_DATA
--out={w}/file | is a file: name a folder
--out={w}/file/x | is not a folder, so
valid_no_masks | valid/masks` is not a folder
valid_value | holds the value 20
valid_size | valid/masks/1.png` is 32x64: bring both
valid_cut | valid/images/1.png` can't be read
empty | valid/images` is not a folder
""", pipa_predict="""
{w}/nofile | no file or folder `{w}/nofile`
{w}/empty | No picture .* in `{w}/empty`
{w}/texts | No picture
{w}/file | 1 of 1 images could not be read
--out={w}/pics | can't hold both pictures and results
--out={w}/file | is a file: name a folder
--ids=foo | no `foo` ids: choose
--alpha=2 | `alpha` is 2.0: it must be from 0 to 1
--alpha=nan | `alpha` is nan
--size=33x33 | multiples of 32
--weights=no.safetensors | no file `no.safetensors`
--weights={w}/no_size.safetensors | give one, such as --size
--weights={w}/export.pkl | fastai pickled
--teacher | no file `{w}/teacher.safetensors`
""", pipa_convert="""
{w}/nofile | check the path
{w}/page.pth | is a web page
{w}/bomb2.pth | not opened
{w}/cut.safetensors | copy it again
{w}/strange.safetensors | build a net
{w}/export.pkl | fastai pickled
--to=foo | `--to foo`: choose one of
--out={w}/w.safetensors | name another one with --out
--classes=cityscapes | net has 11 classes and `--classes cityscapes` names 19
--classes=nowhere | no label space 'nowhere'
--size=33x33 | multiples of 32
--which=foo | holds the student alone
--which=teacher | holds the student alone
--out={w}/file/x | is not a folder, so
--out={w}/empty | is a folder: name a file
--out=/dev/null | `/dev/null` is a device or a pipe
--to=hf --out={w}/file | is a file: name a folder
--classes={w}/latin_codes/codes.txt | no text in UTF-8
""", pipa_export="""
{w}/nofile | check the path
{w}/page.pth | is a web page
{w}/no_classes.safetensors | doesn't say what its classes are
{w}/bad.onnx | can't be opened
--out=x.foo | ends in neither
--out={w}/file/x.pt2 | is not a folder, so
--out={w}/empty | ends in neither
--size=33x33 | multiples of 32
--free=foo | choose one of sides
--teacher | no file `{w}/teacher.safetensors`
""", pipa_study="""
--seeds=a | `a` is no seed: write whole numbers
--seeds= | `` is no seed
--seeds=-1 | `-1` is no seed
--methods=foo | no method `foo`
--methods= | no method ``
--terms=foo | no terms `foo`
--sweep=patch | names no values: write it as
--sweep=tmp=1 | unrecognized arguments: --tmp=1
--sweep=patch=x | --patch: invalid float
--methods=source,minent --sweep=temp=.1,.2 | `temp` would do nothing with any of source, minent: leave it out, or add
--methods=source --args=--weight=2 | `weight` would do nothing with any of source
--jobs=0 | `--jobs` is 0
--jobs=99999999 | `--jobs` is 99999999: it must be from 1 to 1024
--methods=pipa --args=--steps=10000000000000 | `--steps` is 10000000000000
--table=/dev/null | `/dev/null` is a device or a pipe
--size=33x33 | multiples of 32
--args=--nope=1 | unrecognized arguments: --nope=1
--args=" | can't be taken apart .*: close what was opened
--table={w}/empty | is a folder: name a file
--table={w}/table.csv | has no column `method`
--table={w}/zero.safetensors | can't be read as a table
--runs={w}/file | is a file: name a folder
""", pipa_suggest=r"""
nowhere | `--data nowhere` is neither
{w}/empty | No picture
{w}/texts | No picture
{w}/file | is neither `minicity` nor a folder
gta:cityscapes | set PIPA_DATA
{w}/good --n 0 | `-n` is 0: it must be from 1
{w}/good --n abc | argument --n: invalid int
--points=0 | `--points` is 0
--most=-1 | `--most` is -1
--size=33x33 | multiples of 32
--out={w}/file | is a file: name a folder
--out={w}/good/target/images/x | lies among the pictures
--weights={w}/empty | no file `{w}/empty/weights.safetensors`
--weights=nowhere | `nowhere`
""", pipa_check=r"""
nowhere | `nowhere` is not a folder: give
{w}/empty | No picture
{w}/texts | No picture
{w}/file | is not a folder
{w}/pics --masks={w}/empty | No picture
{w}/pics --masks=nowhere | `nowhere` is not a folder
{w}/pics --codes=nowhere | no label space 'nowhere'
cityscapes | set PIPA_DATA
gta --root=nowhere | has no folder `images`
--workers=-1 | `--workers` is -1
--workers=9999999999 | `--workers` is 9999999999
C:\data\city | is not a folder
--out={w}/file | is a file: name a folder
{w}/latin_codes | no text in UTF-8
{w}/no_codes | no file `{w}/no_codes/codes.txt`: write the class names
{w}/one_code | two lines or more
""", pipa_bench="""
--parts=heads | no part heads: choose some of encoder
--model=unet | `--model` is 'unet': choose one of light
--arch=mit_b9 | `--arch` is 'mit_b9': choose one of mit_b0
--arch=lite0 | `--arch` is 'lite0': choose one of mit_b0
--size=100 | `--size` is 100: it must be a multiple of 32
--size=0 | `--size` is 0: it must be from 64
--size=99999968 | `--size` is 99999968
--bs=0 | `--bs` is 0
--classes=1 | `--classes` is 1: it must be from 2
--samples=-1 | `--samples` is -1
--bank=0 | `--bank` is 0
--turns=0 | `--turns` is 0
--threads=0 | `--threads` is 0: it must be from 1
--threads=9999999999 | `--threads` is 9999999999
--device=gpu | `--device gpu` can't be used here
--device=cuda:99 | `--device cuda:99` can't be used here
--out={w}/empty | is a folder: name a file
--out={w}/file/x.csv | is not a folder, so
--out={w}/zero.safetensors | can't be read as a table
--out={w}/cut.pth | can't be read as a table
--out=/dev/null | `/dev/null` is a device or a pipe
""")
rows = [(c, *map(str.strip, l.split(' | ', 1))) for c,t in table.items() for l in t.strip().splitlines()]

def arguments(cmd, said, w):
    words = [o.format(w=w) for o in said.split(' ')]
    words = [f'--data={w/o}' if o in breaks or o=='empty' else o for o in words]
    mine = {o.split('=')[0] if o.startswith('--') else 'first' for o in words}
    return [o for o in (u.format(w=w) for u in usual[cmd]) if (o.split('=')[0] if o.startswith('--') else 'first') not in mine]+words

@pytest.mark.parametrize('cmd,said,says', rows, ids=[f'{c[5:]} {s}' for c,s,_ in rows])
def test_one_sentence(cmd, said, says, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan.subprocess, 'Popen', lambda *a, **k: pytest.fail('the study began'))
    monkeypatch.setattr(parts, 'part_rows', lambda *a: pytest.fail('something was measured'))
    if cmd=='pipa_study': monkeypatch.setattr(cli, 'domains', lambda *a: pytest.fail('the study began'))
    before = tree(world)
    with pytest.raises(SystemExit) as e: shell(cmd, *arguments(cmd, said, world))
    err = capsys.readouterr().err.strip()
    text = f'pipa: {err.splitlines()[-1]}' if e.value.code==2 else e.value.code
    assert text.startswith('pipa: ') and '\n' not in text and 'Error' not in text.replace('SafetensorError', '').replace('UnpicklingError', '').replace('RuntimeError', '').replace('Error while', '').replace('ONNXRuntimeError', '').replace('KeyError', '')
    assert re.search(says.replace('{w}', re.escape(str(world))), text), text
    assert not [*(tmp_path/'here').iterdir()] and tree(world)==before, 'something was written'

def test_the_table_is_long(): assert len({*rows})==len(rows)>150

# --- what begins, and meets the bad file on its way -------------------------------------------------------------------------------------
def said(f, *args, **kw):
    with pytest.raises(SystemExit) as e: f(*args, **kw)
    assert '\n' not in e.value.code and e.value.code.startswith('pipa: ')
    return e.value.code

def whole(out): return not [p for p in out.rglob('*') if p.name.startswith('.') or p.is_file() and not p.stat().st_size and p.name!='metrics.csv']

@pytest.mark.parametrize('workers', [0,1])
def test_a_picture_that_is_damaged_in_its_middle(workers, world, tmp_path):
    "It has head and end, so it is found by who reads it; nothing half-written is left"
    d = Path(shutil.copytree(world/'good', 'town'))
    for f in (d/'target/images').iterdir(): b = f.read_bytes(); f.write_bytes(b[:len(b)//2]+b'damaged'+b[len(b)//2+7:])
    text = said(shell, 'pipa_train', *tiny[:-1], f'--workers={workers}', f'--data={d}', '--out=o')
    assert re.search(r"target/images/\d\.png` can't be read as a picture \(.*\): it may be cut off", text), text
    assert whole(Path('o'))

def test_what_changes_nothing_is_said(world, capsys):
    "An option of the recipe, and a default, are no reason to stop"
    shell('pipa_train', *tiny, '--method=source', '--alpha=.5', '--patch=.1', f'--data={world/"good"}', '--out=o')
    said = [l for l in capsys.readouterr().err.splitlines() if l.startswith('pipa: ')]
    assert said==['pipa: Of no use to the method `source`: `--alpha 0.5`, `--start 0`, `--crop 64x64`.']
    assert Path('o/row.json').exists()
    shell('pipa_train', *tiny, '--config=o', '--out=again')
    a,b = (load(f'{o}/weights.safetensors')[0].state_dict() for o in ('o', 'again')); assert all(torch.equal(v, b[k]) for k,v in a.items())

def test_one_of_many_pictures(world, capsys):
    assert '1 of 2 images could not be read' in said(shell, 'pipa_predict', world/'mixed', f'--weights={world/"w.safetensors"}', '--out=o')
    assert str(world/'mixed/bad.png') in capsys.readouterr().out and len([*Path('o').iterdir()])==3 and whole(Path('o'))

def test_check_lists_what_is_wrong(world, capsys):
    assert 'training would refuse' in said(shell, 'pipa_check', world/'mask_value', '--out=o', '--workers=0')
    assert 'holds the value 20' in capsys.readouterr().out and '1.png' in Path('o/problems.csv').read_text()

@pytest.mark.parametrize('no,words', [(errno.ENOSPC, 'The disk is full: make room'), (errno.EACCES, 'no permission'), (errno.EROFS, 'can only be read: write elsewhere')])
@pytest.mark.parametrize('cmd', ['pipa_predict', 'pipa_convert', 'pipa_eval', 'pipa_train'])
def test_a_disk_that_takes_no_more(cmd, no, words, world, monkeypatch):
    def fail(a, b): raise OSError(no, os.strerror(no), str(b))
    monkeypatch.setattr(os, 'replace', fail)
    assert words in said(shell, cmd, *arguments(cmd, f'--out=o{".safetensors"*(cmd=="pipa_convert")}', world))
    assert not [p for p in Path('.').rglob('*') if p.is_file() and p.name!='metrics.csv']

def test_no_permission_and_no_room_are_seen_before(world, monkeypatch):
    for cmd in ('pipa_predict', 'pipa_eval', 'pipa_train', 'pipa_check', 'pipa_export'):
        args = arguments(cmd, f'--out=o{".pt2"*(cmd=="pipa_export")}', world)
        with monkeypatch.context() as m:
            m.setattr(os, 'access', lambda *a: False); assert 'You may not write into' in said(shell, cmd, *args)
        with monkeypatch.context() as m:
            m.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(1, 1, 0)); assert 'is full: make room' in said(shell, cmd, *args)
    assert not [*Path('.').iterdir()]

# --- what must work ---------------------------------------------------------------------------------------------------------------------
def test_spaces_and_letters_of_the_world(world, capsys):
    "Also: a BOM and CRLF in codes.txt, one image, a batch larger than the set, pictures in a folder called like one, a full stop at the end"
    d = Path(shutil.copytree(world/'good', 'mes données ü 数据 & co'))
    (d/'codes.txt').write_bytes('\ufeff'.encode()+'\r\n'.join(codes).encode()); (d/'target/images/old.png').mkdir(); shutil.rmtree(d/'target/masks')
    for p in ('source/images', 'source/masks', 'valid/images', 'valid/masks', 'target/images'):
        (d/p/'1.png').unlink(); (d/p/'0.png').rename(d/p/'Straße 17 – été.v2.png')
    shell('pipa_train', *tiny, '--bs=3', f'--data={d}', '--out=résultat 1')
    shell('pipa_eval', 'résultat 1', f'--data={d}', '--out=note ü')
    shell('pipa_predict', d/'target/images', '--weights=résultat 1', '--out=ü out')
    assert Path('ü out/Straße 17 – été.v2_labels.png').exists() and {o.name for o in Path('résultat 1').iterdir()}>{'weights.safetensors', 'row.json'}
    shell('pipa_convert', 'résultat 1/weights.safetensors', '--to=official', '--out=aus ü.pth'); assert load('aus ü.pth')[0].n_out==len(codes)
    shell('pipa_check', d, '--out=blick ü', '--workers=0'); assert Path('blick ü/classes.csv').exists()

# --- the same from Python ---------------------------------------------------------------------------------------------------------------
def calls(w):
    src,tgt = [data.folder(w/f'good/{o}/images', w/f'good/{o}/masks', codes) for o in ('source', 'target')]
    dls = lambda **kw: data.uda_dls(src, tgt.unlabelled(), **dict(bs=1, n=1, size=(64,64), device='cpu') | kw)
    own = dls(); net = light('mit_b0', n_out=len(codes)); x = np.zeros((64,64,3), np.uint8)
    learn = lambda **kw: learner.uda_learner(own, **kw)
    return {
        '`bs` is 0': lambda: dls(bs=0), 'has no batch of 2': lambda: dls(bs=2), '`num_workers` is -1': lambda: dls(num_workers=-1), 'height of `size`` is 0': lambda: dls(size=(0,64)),
        'least zoom` is 0': lambda: dls(zoom=(0,1)), 'largest zoom` is 1': lambda: dls(zoom=(2,1)), '`rcs_temp` is 0': lambda: dls(rcs_temp=0),
        'has no masks: adaptation': lambda: data.uda_dls(tgt.unlabelled(), src), 'target domain `.*` has no image': lambda: data.uda_dls(src, tgt.take([]), n=1, bs=1),
        'name different classes': lambda: dls(valid=data.folder(w/'good/valid/images', w/'good/valid/masks', ['a','b'])), 'validation domain .* has no masks': lambda: dls(valid=tgt.unlabelled()),
        'is not a folder': lambda: data.folder(w/'nowhere'), 'no label space': lambda: data.codes_space('nowhere'), 'appears more than once': lambda: data.codes_space(['a','a']), 'no `?preset': lambda: data.preset('foo'),
        'no net `x`': lambda: learn(model='x'), 'no method `x`': lambda: learn(method='x'), '`lr` is -1': lambda: learn(lr=-1), '`wd` is -1': lambda: learn(wd=-1), '`alpha` is 2': lambda: learn(alpha=2),
        '`n_unlabelled`|`n_unlabelled` is -1': lambda: learn(n_unlabelled=-1), 'no file': lambda: learn(pretrained=w/'no.pth'),
        'not float64 of shape': lambda: infer.predict(net, x/255.), 'no mode `x`': lambda: infer.predict(net, x, mode='x'), 'too small for a net': lambda: infer.predict(net, x, mode='slide', crop=16),
        'would leave gaps': lambda: infer.predict(net, x, mode='slide', crop=32, stride=64), 'The net has 11 classes': lambda: infer.predict(net, x, space=label_space(['a','b'])), 'There is no file `nope.png`': lambda: infer.predict(net, 'nope.png'),
        'source domain|no masks: a score': lambda: infer.evaluate(net, tgt.unlabelled()), "doesn't fit the net": lambda: load(w/'w.safetensors', net=light('mit_b0', n_out=3)), 'the student alone': lambda: load(w/'w.safetensors', which='teacher'),
        'x` can.t be kept': lambda: save('x.safetensors', net, x=object()), 'no train ids': lambda: label_space(['a','b'], ids={0:7}), 'palette has shape': lambda: label_space(['a','b'], [[0,0,0]]),
        '1 more of `.*` can.t be read: `pipa_check` lists': lambda: data.uda_dls(src, data.folder(w/'target_cut/target/images', None, codes), bs=1, n=1, size=(64,64), device='cpu'),
        '`guard` is .stpo.: choose one of stop, skip': lambda: learn(guard='stpo'),
        'must be none of the': lambda: labels.LabelSpace('x', ['a','b'], ignore=1)}

def test_sentences_from_python(world, tmp_path):
    for says,f in calls(world).items():
        with pytest.raises((ValueError, TypeError, KeyError, FileNotFoundError)) as e: f()
        assert re.search(says, str(e.value)) and '\n' not in str(e.value), (says, e.value)
    assert not [*Path('.').iterdir()]
