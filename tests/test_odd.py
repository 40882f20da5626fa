"Odd nets, masks, folders and lists of classes: what is refused says why, and what is taken is right"
import os, re, struct, types, zlib
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from pipa.data import codes_space, eval_dl, folder, read_image, read_mask, uda_dls
from pipa.export import export_net
from pipa.infer import evaluate, predict
from pipa.labels import LabelSpace, label_space, synthia19
from pipa.learner import uda_learner
from pipa.models import adapt, get_logits, renamed
from pipa.sets.pictures import read_numbers
from pipa.sets.rare import class_counts
from pipa.widgets import PatchConsistency, PixelEmbeddingExplorer
from tiny import seed

pytestmark = pytest.mark.usefixtures('own_cache')
abc = label_space(['sky', 'road', 'car'])
scene = np.zeros((64,96), np.uint8); scene[32:] = 1; scene[40:56,10:40] = 2

def lay(home, masks=True, n=4, hw=(64,96), y=scene):
    (home/'images').mkdir(parents=True)
    (home/'masks').mkdir()
    rng = np.random.default_rng(len(home.name))
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (*hw,3)).astype(np.uint8)).save(home/f'images/{i}.png')
        Image.fromarray(np.resize(y, hw)).save(home/f'masks/{i}.png')
    return folder(home/'images', home/'masks' if masks else None, abc, home.name)

@pytest.fixture
def sets(tmp_path): return lay(tmp_path/'source'),lay(tmp_path/'target', False)

class Pixel(nn.Module):
    "Logits of single pixels, answered in the form of `f`"
    def __init__(self, f=lambda z: z, k=3):
        super().__init__()
        self.c,self.f = nn.Conv2d(3, k, 1),f
    def forward(self, x): return self.f(self.c(x))

def learner(sets, net, method='self_training', path='.', **kw):
    seed()
    dls = uda_dls(*sets, bs=2, size=(64,64), device='cpu', seed=1)
    return uda_learner(dls, net, method, path=path, **kw)

def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(1)
    return learn

# --- nets -----------------------------------------------------------------------------------------------------------------------------------
wrong = dict(tuple=(lambda z: (z,z), 'tuple'), numpy=(lambda z: z.detach().numpy(), 'ndarray'), none=(lambda z: None, 'NoneType'),
    flat=(lambda z: z.mean((2,3)), 'shape .*, 3\\)'), labels=(lambda z: z.argmax(1), 'int64 of shape'), whole=(lambda z: z.long(), 'int64'),
    no_channel=(lambda z: z[:,0], 'shape'), last=(lambda z: z.movedim(1, -1), 'the class second'), fewer=(lambda z: z[:0], 'the class second'),
    inf=(lambda z: z/0, 'NaN or infinite'))

@pytest.mark.parametrize('how', wrong)
def test_answers_that_are_no_logits(how, sets):
    "Without a label space, too: a label map of the wrong thing would look like any other"
    f,said = wrong[how]
    net = Pixel(f)
    for ask in (lambda: predict(net, sets[0].images[0]), lambda: predict(net, sets[0].images[0], space=abc),
                lambda: evaluate(net, sets[0], progress=False)):
        with pytest.raises((TypeError,ValueError), match=said): ask()

@pytest.mark.parametrize('how', ['tensor', 'out', 'logits', 'object', 'small'])
def test_every_form_of_logits_is_trained_alike(how, sets):
    "A net without features: bare logits of a batch of 2 aren't logits and features"
    form = dict(tensor=lambda z: z, out=lambda z: dict(out=z), logits=lambda z: dict(logits=z), small=lambda z: z[...,::4,::4],
                object=lambda z: types.SimpleNamespace(logits=z))[how]
    for method in ('self_training', 'minent', 'advent', 'mic'):
        kw = dict(host=dict(width=4)) if method=='advent' else {}
        def last(f):
            seed()
            return str(fit(learner(sets, Pixel(f), method, **kw)).recorder.values[-1])   # of NaN, too: no trust, no mean
        assert last(form)==last(lambda z: z) or how=='small'

def test_a_net_without_maps_and_a_distance_of_maps(sets):
    with pytest.raises(ValueError, match='Pixel doesn\'t say what maps it has.*adapt'): learner(sets, Pixel(), 'daformer')

@pytest.mark.parametrize('dt', [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_another_type(dt, sets):
    net = Pixel()
    want = predict(net, sets[0].images[0])
    assert (predict(net.to(dt), sets[0].images[0])==want).mean()>.95
    with pytest.raises(ValueError, match=f'weights of {dt}.*net.float'): learner(sets, net)

@pytest.mark.parametrize('size', [0, (0,64), -64, 64.5, (1,2,3), '64x96', (64,'x')])
def test_sizes_that_are_none(size, sets):
    with pytest.raises(ValueError, match='is no size: give height and width'): predict(Pixel(), sets[0].images[0], size=size)
    with pytest.raises(ValueError, match='`crop=.*is no size'): predict(Pixel(), sets[0].images[0], mode='slide', crop=size)

def test_a_size_of_numpy(sets): assert predict(Pixel(), sets[0].images[0], size=np.array([64,96])).shape==(64,96)

@pytest.mark.parametrize('net', ['light', Pixel])
def test_what_is_no_net(net, sets):
    with pytest.raises(TypeError, match='is no net but a'): predict(net, sets[0].images[0])

def wrapped(k=3): return adapt(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, k, 1)), '1', 8, k)

def spoilt(k):
    net = wrapped(3 if k=='nan' else k)
    if k=='nan': net.net[2].bias.data[:] = np.nan
    return net

said = {1:'1 logit a pixel', 5:'5 classes and `own` has 3|5 classes', 'nan':'NaN'}

@pytest.mark.parametrize('k', said)
def test_explorers_and_export_look_at_the_logits(k, sets, tmp_path):
    with pytest.raises(ValueError, match=said[k]): export_net(tmp_path/'a.pt2', spoilt(k), abc, (64,64))
    assert not (tmp_path/'a.pt2').exists()
    learn = learner(sets, wrapped(), 'pipa', crop=(32,32))
    learn.model = spoilt(k)
    for ask in (lambda: PixelEmbeddingExplorer(learn, n_images=2), lambda: PatchConsistency(learn, n_images=2).scores()):
        with pytest.raises(ValueError, match=said[k]): ask()

def test_names_in_another_wrapping():
    plain = Pixel().state_dict()
    parts = {k.replace('c.', 'module.c._orig_mod.'):v for k,v in plain.items()}
    assert renamed(parts, plain).keys()==plain.keys() and renamed(plain, parts).keys()==parts.keys()

# --- loaders --------------------------------------------------------------------------------------------------------------------------------
def test_a_validation_without_an_image_is_not_the_source(sets):
    with pytest.raises(ValueError, match='validation domain `source` has no image'): uda_dls(*sets, sets[0].take([]), bs=2, size=(64,64))
    with pytest.raises(TypeError, match="'here' is no `Domain`"): uda_dls('here', sets[1])

def test_validation_images_of_several_sizes(sets, tmp_path):
    v = lay(tmp_path/'valid')
    Image.new('RGB', (96,32)).save(v.images[1]); Image.new('L', (96,32)).save(v.masks[1])
    assert uda_dls(*sets, v, bs=2, size=(64,64)).valid.bs==1
    with pytest.raises(ValueError, match='1.png` is 32x96.*bs_valid=1'): uda_dls(*sets, v, bs=2, size=(64,64), bs_valid=2)

@pytest.mark.parametrize('hw', [(1,4000), (4000,1)])
def test_strips_are_not_enlarged_for_validation(hw, tmp_path):
    x,_ = eval_dl(lay(tmp_path/'v', n=1, hw=hw), (128,128), 1).one_batch()
    assert sorted(x.shape[-2:])==[32,4000]

def test_lr_find_says_nothing_of_a_validation(sets, tmp_path, capfd):
    learn = learner(sets, Pixel(), path=tmp_path)
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False, stop_div=False)
    assert 'not finite' not in ''.join(capfd.readouterr())

# --- masks ----------------------------------------------------------------------------------------------------------------------------------
def png(path, a, bits, kind):
    "A PNG as its specification has it: PIL can't write these"
    def chunk(t, d): return struct.pack('>I', len(d))+t+d+struct.pack('>I', zlib.crc32(t+d))
    if bits==16: rows = a.astype('>u2').reshape(len(a), -1)
    else: rows = np.packbits((a[...,None]>>np.arange(bits)[::-1]&1).astype(np.uint8).reshape(len(a), -1), axis=1)
    raw = b''.join(b'\0'+r.tobytes() for r in rows)
    path.write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', a.shape[1], a.shape[0], bits, kind, 0, 0, 0))
                     +chunk(b'IDAT', zlib.compress(raw))+chunk(b'IEND', b''))
    return path

@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_a_grey_png_of_few_bits_holds_its_numbers(bits, tmp_path):
    "Pillow stretches them to 255: class 3 of 2 bits would be void"
    y = np.minimum(scene, 2**bits-1)
    assert (read_mask(png(tmp_path/'a.png', y, bits, 0), abc)==y).all()

@pytest.mark.parametrize('kind,n', [(4,2), (2,3), (6,4)])
def test_masks_of_16_bits_in_colour_are_synthias_alone(kind, n, sets, tmp_path):
    a = np.stack([scene, 7+0*scene, 0*scene, 0*scene][:n], -1)
    dom = lay(tmp_path/'d', n=1)
    png(dom.masks[0], a, 16, kind)
    for f in (lambda: read_mask(dom.masks[0], abc), lambda: class_counts(dom)):
        with pytest.raises(ValueError, match=f'0.png` has {n} channels'): f()
    if n==3: assert set(np.unique(read_mask(dom.masks[0], synthia19)).tolist())<={0,1,2,10,255}

def tif(path, a, white, kind=1):
    "A TIFF of 8 bits: which number is white, and whether numbers are signed"
    h,w = a.shape
    es = [(256,w), (257,h), (258,8), (259,1), (262,white), (273,8), (277,1), (278,h), (279,a.size), (339,kind)]
    body = struct.pack('<H', len(es))+b''.join(struct.pack('<HHII', k, 4, 1, v) for k,v in es)+struct.pack('<I', 0)
    path.write_bytes(b'II'+struct.pack('<HI', 42, 8+a.size)+a.tobytes()+body)
    return path

def test_a_tiff_in_which_0_is_white(tmp_path):
    "Pillow turns the numbers of such a mask around, other readers don't; as a picture there is no doubt"
    f = tif(tmp_path/'a.tif', scene, 0)
    with pytest.raises(ValueError, match='a.tif` is a TIFF in which 0 is white'): read_mask(f, abc)
    assert (np.asarray(read_image(f))[...,0]==255-scene).all()
    assert (read_mask(tif(tmp_path/'b.tif', scene, 1), abc)==scene).all()

def test_signed_bytes(tmp_path):
    f = tif(tmp_path/'a.tif', (scene.astype(np.int8)-1).view(np.uint8), 1, 2)
    assert np.unique(read_numbers(f)).tolist()==[-1,0,1]
    with pytest.raises(ValueError, match='holds the value -1.*void: -1'): read_mask(f, abc)

def test_8_bits_stretched_to_16(tmp_path):
    Image.fromarray(scene.astype(np.uint16)*257).save(f := tmp_path/'a.png')
    with pytest.raises(ValueError, match='holds the value 257.*divide them by 257'): read_mask(f, abc)

# --- files ----------------------------------------------------------------------------------------------------------------------------------
def test_files_that_are_left_out_are_named(tmp_path):
    dom = lay(tmp_path/'d')
    (tmp_path/'d/images/x.heic').write_bytes(b'x'); (tmp_path/'d/images/notes.txt').write_text('x')
    with pytest.warns(UserWarning, match='1 file of another kind left out, such as `.*x.heic`'):
        assert folder(tmp_path/'d/images').images==dom.images
    (tmp_path/'e').mkdir(); (tmp_path/'e/a.gif').write_bytes(b'x'); (tmp_path/'e/b.gif').write_bytes(b'x')
    with pytest.raises(FileNotFoundError, match='2 files of another kind.*a.gif`: save as PNG'): folder(tmp_path/'e')

def test_one_folder_for_both(tmp_path):
    lay(tmp_path/'d')
    with pytest.raises(ValueError, match='given for the images and for their masks'): folder(tmp_path/'d/images', tmp_path/'d/masks/../images', abc)

def test_a_link_to_itself_and_a_pointer(tmp_path):
    lay(tmp_path/'d')
    os.symlink(f := tmp_path/'d/images/9.png', f)
    for read in (lambda: folder(tmp_path/'d/images'), lambda: read_image(f)):
        with pytest.raises((ValueError,OSError), match='9.png'): read()
    f.unlink(); f.write_text('version https:/'+'/git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
    with pytest.raises(ValueError, match='9.png` is a pointer of Git LFS.*git lfs pull'): read_image(f)

# --- lists of classes -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('line', ['void:', 'void: x', 'void: 3-9', 'ignore = 3.0', 'unlabeled: none'])
def test_a_line_of_void_without_numbers_is_no_class(line):
    with pytest.raises(ValueError, match=re.escape(f'the line `{line}` has no whole numbers')): LabelSpace.from_lines(['a', 'b', line])

@pytest.mark.parametrize('lines', [['0 sky', '1 road'], ['0,sky', '1,road'], ['0; sky', '1; road']])
def test_numbers_before_names(lines):
    with pytest.raises(ValueError, match=f'`{lines[0]}` begins with a number.*`7: name`'): LabelSpace.from_lines(lines)

def test_numbers_in_names_stay(): assert LabelSpace.from_lines(['2 wheels', 'road']).codes==['2 wheels', 'road']

def test_remarks(tmp_path):
    (tmp_path/'codes.txt').write_bytes('\ufeff# mine\r\nsky\r\n\r\n  # more\r\nroad\r\nvoid: 9\r\n'.encode())
    sp = codes_space(tmp_path/'codes.txt')
    assert sp.codes==['sky', 'road'] and 9 in sp.void

def test_get_logits_of_a_dict():
    z = torch.zeros(1, 2, 4, 4)
    assert get_logits(dict(logits=z)) is z and get_logits(dict(out=z, aux=z+1)) is z
