"The published layouts with their bit depths and palettes, and one tree with each mistake"
import json, struct, zlib
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from scipy.io import savemat
from pipa.data import *
from pipa.sets.pictures import read_numbers
from pipa.labels import cityscapes19 as cs, mapillary_space, space
from pipa.sets.rare import complaints, look
from pipa.learner import uda_learner
from tiny import fit, seed

pytestmark = pytest.mark.usefixtures('own_cache')

H,W = 40,72
# a street in the 19 classes of Cityscapes: road, sidewalk, building, sky, car, person, void
street = np.full((H,W), 10, np.uint8)
street[8:26,:30], street[26:], street[30:,:14], street[20:32,40:58], street[18:30,62:66], street[38:] = 2, 0, 1, 13, 11, 255
here = sorted({*street.ravel().tolist()}-{255})

def picture(seed=0): return np.random.default_rng(seed).integers(0, 256, (H,W,3)).astype(np.uint8)
def save(path, a, palette=None, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    o = Image.fromarray(a)
    if palette is not None: o.putpalette(palette)
    o.save(path, **kw)
    return path

def save16(path, a):
    "A PNG of 16 bits and three channels, from its specification; rows in turn with each kind of filter"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows,old = b'',np.zeros(a.shape[1]*6, int)
    for i,r in enumerate(a.astype('>u2')):
        b = np.frombuffer(r.tobytes(), np.uint8).astype(int)
        left,corner = (np.concatenate([np.zeros(6, int), o[:-6]]) for o in (b, old))
        p = left+old-corner
        da,db,dc = abs(p-left),abs(p-old),abs(p-corner)
        paeth = np.where((da<=db)&(da<=dc), left, np.where(db<=dc, old, corner))
        kind = i%5
        rows += bytes([kind])+((b-[0*b, left, old, (left+old)//2, paeth][kind])%256).astype(np.uint8).tobytes()
        old = b
    def chunk(name, o): return struct.pack('>I', len(o))+name+o+struct.pack('>I', zlib.crc32(name+o))
    head = struct.pack('>IIBBBBB', a.shape[1], a.shape[0], 16, 2, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', head)+chunk(b'IDAT', zlib.compress(rows))+chunk(b'IEND', b''))
    return path

def raw(sp, void):
    "The street in the raw ids of a space"
    back = {c:k for k,c in sp.ids.items()}
    return np.vectorize(lambda c: back.get(int(c), void))(street)

# --- trees ------------------------------------------------------------------------------------------------------------------------------
n = 3

def gta_tree(root):
    for i in range(1, n+1):
        save(root/f'images/{i:05d}.png', picture(i))
        save(root/f'labels/{i:05d}.png', raw(cs, 4).astype(np.uint8), np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    return lambda: gta(root)

def synthia_tree(root):
    for i in range(n):
        save(root/f'RGB/{i:07d}.png', np.dstack([picture(i), np.full((H,W), 255, np.uint8)]))
        objects = np.random.default_rng(i).integers(0, 60000, (H,W))
        save16(root/f'GT/LABELS/{i:07d}.png', np.stack([raw(space('synthia'), 22), objects, 0*objects], -1))
    return lambda: synthia(root)

def cityscapes_tree(root, train_ids=False):
    for i in range(n):
        k = f'ulm_{i:06d}_000019'
        save(root/f'leftImg8bit/train/ulm/{k}_leftImg8bit.png', picture(i))
        for end,y in (('labelIds', raw(cs, 3)), ('color', cs.color(street)), ('labelTrainIds', street))[:3 if train_ids else 2]:
            save(root/f'gtFine/train/ulm/{k}_gtFine_{end}.png', y.astype(np.uint8))
        save(root/f'gtFine/train/ulm/{k}_gtFine_instanceIds.png', np.where(street==13, 26001, raw(cs, 3)).astype(np.uint16))
    return lambda: cityscapes(root)

def acdc_tree(root):
    for i,cond in enumerate(('fog', 'night', 'rain')):
        save(root/f'rgb_anon/{cond}/train/GOPR{i}/GOPR{i}_frame_1_rgb_anon.png', picture(i))
        save(root/f'gt/{cond}/train/GOPR{i}/GOPR{i}_frame_1_gt_labelIds.png', raw(cs, 0).astype(np.uint8))
        save(root/f'rgb_anon/{cond}/train_ref/GOPR{i}/GOPR{i}_frame_1_rgb_ref_anon.png', picture(i))
    return lambda: acdc(root)

def bdd_tree(root):
    for i in range(n): save(root/f'images/10k/train/{i}-ab.jpg', picture(i)); save(root/f'labels/sem_seg/masks/train/{i}-ab.png', street)
    return lambda: bdd100k(root)

vistas = '''animal--bird construction--flat--road construction--flat--sidewalk construction--structure--building construction--barrier--wall
    object--support--pole nature--sky nature--vegetation human--person object--vehicle--car object--vehicle--bus nature--terrain void--unlabeled'''.split()

def mapillary_tree(root):
    sp = mapillary_space(vistas)
    for i in range(n):
        save(root/f'training/images/{i}_x.jpg', picture(i))
        save(root/f'training/labels/{i}_x.png', raw(sp, 12).astype(np.uint8), bytes(range(256))*3)
    (root/'config.json').write_text(json.dumps(dict(labels=[dict(name=o, readable=o, color=[1,2,3]) for o in vistas])))
    return lambda: mapillary(root)

trees = dict(gta=gta_tree, synthia=synthia_tree, cityscapes=cityscapes_tree, trainids=lambda r: cityscapes_tree(r, True), acdc=acdc_tree,
             bdd=bdd_tree, mapillary=mapillary_tree)

@pytest.mark.parametrize('name', trees)
def test_read_as_downloaded(name, tmp_path):
    before = trees[name](tmp_path/name)
    files = {p: p.read_bytes() for p in sorted(tmp_path.rglob('*')) if p.is_file()}
    d = before()
    assert len(d)==n and d.space.codes==cs.codes and len({*d.images})==n==len({*d.masks})
    for m in d.masks: assert (read_mask(m, d.space)==street).all()
    assert (class_counts(d)==[[(street==c).sum() for c in range(19)]]*n).all()
    dls = uda_dls(d, d, bs=2, size=(32,32), n=4, device='cpu', seed=0)
    x,y,t = dls.train.one_batch()
    assert {*y.unique().tolist()}<={*here, 255} and x.shape==t.shape==(2,3,32,32)
    assert files=={p: p.read_bytes() for p in sorted(tmp_path.rglob('*')) if p.is_file() and 'xdg' not in p.parts}, 'nothing is written into a data set'

def test_all_filters_of_16_bit_png(tmp_path):
    a = np.random.default_rng(0).integers(0, 65536, (11,7,3))
    assert (read_numbers(save16(tmp_path/'ünï.png', a))==a).all()
    g = np.random.default_rng(0).integers(0, 65536, (11,7)).astype(np.uint16)
    assert (read_numbers(save(tmp_path/'grey.png', g))==g).all()

def test_found_in_the_data_root(tmp_path, monkeypatch):
    gta_tree(tmp_path/'root/gta'); cityscapes_tree(tmp_path/'root/cityscapes')
    monkeypatch.setenv('PIPA_DATA', str(tmp_path/'root'))
    assert len(gta())==n==len(cityscapes())
    with pytest.raises(FileNotFoundError, match='has no folder `RGB`.*data/README.md'): synthia()

def test_gta_splits(tmp_path):
    d = gta_tree(tmp_path)
    savemat(tmp_path/'split.mat', dict(trainIds=np.array([[1],[3]], float), valIds=np.array([[2]], float), testIds=np.array([[9]], float)))
    assert [p.stem for p in gta(tmp_path, 'train').images]==['00001','00003'] and [m.stem for m in gta(tmp_path, 'val').masks]==['00002']
    assert len(d())==3
    with pytest.raises(FileNotFoundError, match='no image'): gta(tmp_path, 'test')
    with pytest.raises(ValueError, match="no split `other`"): gta(tmp_path, 'other')

def test_targets_need_no_masks(tmp_path):
    import shutil
    for name,gt in dict(cityscapes='gtFine', acdc='gt', bdd='labels', mapillary='training/labels').items():
        d = trees[name](tmp_path/name)
        shutil.rmtree(tmp_path/name/gt)
        assert d().masks is None and len(d())==n
    with pytest.raises(FileNotFoundError, match='have no mask'): cityscapes(tmp_path/'cityscapes', labels=True)

def test_one_mask_missing(tmp_path):
    d = cityscapes_tree(tmp_path)
    next(tmp_path.rglob('*_gtFine_labelIds.png')).unlink()
    with pytest.raises(FileNotFoundError, match='1 of 3 images have no mask'): d()
    assert cityscapes(tmp_path, labels=False).masks is None

def test_files_of_the_converters(tmp_path):
    "Their counts are taken instead of reading masks, in each of the three forms"
    d = gta_tree(tmp_path)
    rows = [{'0':5, '13':i+1, 'file':f'data/gta/labels/{i:05d}_labelTrainIds.png'} for i in range(1, n+1)]
    (tmp_path/'sample_class_stats.json').write_text(json.dumps(rows))
    want = np.zeros((n,19), int); want[:,0] = 5; want[:,13] = [2,3,4]
    assert (class_counts(d())==want).all()
    (tmp_path/'sample_class_stats.json').unlink()
    (tmp_path/'sample_class_stats_dict.json').write_text(json.dumps({r['file']: {k:v for k,v in r.items() if k!='file'} for r in rows}))
    assert (class_counts(d())==want).all()
    (tmp_path/'sample_class_stats_dict.json').unlink()
    (tmp_path/'samples_with_class.json').write_text(json.dumps({c: [[r['file'], r[c]] for r in rows] for c in ('0','13')}))
    assert (class_counts(d())==want).all() and not (tmp_path/'xdg').exists()
    (tmp_path/'samples_with_class.json').write_text(json.dumps({'0': [[rows[0]['file'], 5]]}))
    assert (class_counts(d())==[[(street==c).sum() for c in range(19)]]*n).all(), 'a file that leaves masks out is not enough'
    (tmp_path/'samples_with_class.json').write_text(json.dumps({'30': [[r['file'], 5] for r in rows]}))
    with pytest.raises(ValueError, match='counts class 30'): class_counts(d())

def test_camvid_in_three_forms(tmp_path):
    eleven = np.random.default_rng(0).integers(0, 12, (H,W)).astype(np.uint8)
    names = '''Animal Archway Bicyclist Bridge Building Car CartLuggagePram Child Column_Pole Fence LaneMkgsDriv LaneMkgsNonDriv Misc_Text
        MotorcycleScooter OtherMoving ParkingBlock Pedestrian Road RoadShoulder Sidewalk SignSymbol Sky SUVPickupTruck TrafficCone TrafficLight
        Train Tree Truck_Bus Tunnel VegetationMisc Void Wall'''.split()
    colors = dict(Sky=(128,128,128), Building=(128,0,0), Column_Pole=(192,192,128), Road=(128,64,128), Sidewalk=(0,0,192), Tree=(128,128,0),
                  SignSymbol=(192,128,128), Fence=(64,64,128), Car=(64,0,128), Pedestrian=(64,64,0), Bicyclist=(0,128,192), Void=(0,0,0))
    save(tmp_path/'a/train/1.png', picture()); save(tmp_path/'a/trainannot/1.png', eleven)
    save(tmp_path/'b/images/1.png', picture()); save(tmp_path/'b/images/2.png', picture())
    ids = np.array([names.index(k) for k in colors], np.uint8)
    for k in '12': save(tmp_path/f'b/labels/{k}_P.png', ids[eleven])
    (tmp_path/'b/valid.txt').write_text('2.png\n'); (tmp_path/'b/codes.txt').write_text('\n'.join(names))
    save(tmp_path/'c/701_StillsRaw_full/1.png', picture()); save(tmp_path/'c/LabeledApproved_full/1_L.png', np.array([*colors.values()], np.uint8)[eleven])
    for d in (camvid(tmp_path/'a'), camvid(tmp_path/'b'), camvid(tmp_path/'b', 'val'), camvid(tmp_path/'c', 'all')):
        assert len(d)==1 and (read_mask(d.masks[0], d.space)==np.where(eleven==11, 255, eleven)).all()
        assert (class_counts(d)[0]==np.bincount(eleven.ravel(), minlength=12)[:11]).all()
    with pytest.raises(FileNotFoundError, match='valid.txt'): camvid(tmp_path/'c', 'val')

# --- mistakes ---------------------------------------------------------------------------------------------------------------------------
def mistake(root, name):
    "A folder data set of three, with one mistake; the words of the message"
    ys,codes = [street.copy() for _ in range(n)],cs.as_train()
    ok = lambda: [save(root/f'masks/{i}.png', y) for i,y in enumerate(ys)]
    for i in range(n): save(root/f'images/{i}.png', picture(i))
    ok()
    bad = root/'masks/1.png'
    if name=='raw ids': save(bad, raw(cs, 3).astype(np.uint8)); words = '1.png.*raw ids of Cityscapes or GTA.*label space'
    if name=='0/255': ys = [np.where(street==0, 255, 0).astype(np.uint8)]*n; ok(); codes = ['other', 'road']; words = 'nothing but 0 and 255.*divide'
    if name=='rgb': save(bad, cs.color(street)); words = '1.png.*3 channels.*saved in colour'
    if name=='off by one': save(bad, np.where(street==255, 255, street+1).astype(np.uint8)); codes = codes.codes[:14]; words = '1.png.*from 1: subtract 1'
    if name=='size': save(bad, street[::2,::2]); words = r'1.png` is 40x72, but its mask.*1.png` is 20x36'
    if name=='cut off': bad.write_bytes(bad.read_bytes()[:-60]); words = "1.png.*can't be read as a mask.*cut off"
    if name=='instances': save(bad, np.where(street==13, 26001, 7).astype(np.uint16)); words = '1.png.*instance ids'
    if name=='translated': codes = cs; words = 'these are train ids.*as_train'
    if name=='8 bits of SYNTHIA': ys = [0*street]*n; ok(); codes = space('synthia'); words = 'No class has a pixel'
    if name=='other file': save(bad, picture()[...,0]); words = '1.png.*holds the value'
    return folder(root/'images', root/'masks', codes),words

mistakes = ['raw ids', '0/255', 'rgb', 'off by one', 'size', 'cut off', 'instances', 'translated', '8 bits of SYNTHIA', 'other file']

@pytest.mark.parametrize('name', mistakes)
def test_training_refuses(name, tmp_path):
    d,words = mistake(tmp_path, name)
    with pytest.raises(ValueError, match=words): uda_dls(d, d, bs=2, size=(32,32), device='cpu')
    assert [s for _,s in complaints(d, [look(*o) for o in zip(d.images, d.masks)])]

def test_no_complaint(tmp_path):
    d = gta_tree(tmp_path)()
    assert not [*complaints(d, [look(*o) for o in zip(d.images, d.masks)])]

# --- no leak ----------------------------------------------------------------------------------------------------------------------------
def trained(d):
    seed(5)
    dls = uda_dls(d('source'), d('target'), d('source').take([0]), bs=2, size=(64,64), resize=(64,96), n=4, margin=(.1,.1,0,0), rcs_temp=.1, device='cpu')
    batches = [b for b in dls.train]
    seed(6)
    learn = fit(uda_learner(dls, 'light', 'pipa', hidden=16, crop=(32,32), thresh=.01, patch=dict(thresh=.01), pixel=dict(min_pixels=4)))
    return [o for b in batches for o in b],[*learn.model.state_dict().values()]

@pytest.mark.parametrize('name', ['gta', 'synthia', 'trainids', 'mapillary'])
def test_target_masks_are_never_read(name, tmp_path):
    import shutil
    source,target = trees[name](tmp_path/'source'),trees[name](tmp_path/'target')
    def d(which): return dict(source=source, target=target)[which]()
    assert len(d('target').masks)==n
    whole = trained(d)
    masks = [m for m in d('target').masks]
    for m in masks: m.write_bytes(b'poison')
    for a,b in zip(whole, trained(d)): assert len(a)==len(b) and all(torch.equal(u, v) for u,v in zip(a, b))
    t = d('target').unlabelled()
    for m in masks: m.unlink()
    for a,b in zip(whole, trained(lambda w: d(w) if w=='source' else t)): assert all(torch.equal(u, v) for u,v in zip(a, b))
