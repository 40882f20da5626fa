"Label spaces against the published tables and an id-by-id translation"
import pickle
import numpy as np, pytest, torch
from PIL import Image
import pipa.labels as L
from pipa.labels import *

spaces = [cityscapes19, gta19, synthia19, camvid11, minicity11]

def slow_encode(s, m):
    "The dictionary, one pixel at a time"
    return np.array([s.ids.get(int(i), s.ignore) for i in np.asarray(m).ravel()], np.uint8).reshape(np.shape(m))

def test_cityscapes_table():
    "Written down class by class, independently of the order in the module"
    t = {'road':(7,(128,64,128)), 'sidewalk':(8,(244,35,232)), 'building':(11,(70,70,70)), 'wall':(12,(102,102,156)), 'fence':(13,(190,153,153)),
         'pole':(17,(153,153,153)), 'traffic light':(19,(250,170,30)), 'traffic sign':(20,(220,220,0)), 'vegetation':(21,(107,142,35)),
         'terrain':(22,(152,251,152)), 'sky':(23,(70,130,180)), 'person':(24,(220,20,60)), 'rider':(25,(255,0,0)), 'car':(26,(0,0,142)),
         'truck':(27,(0,0,70)), 'bus':(28,(0,60,100)), 'train':(31,(0,80,100)), 'motorcycle':(32,(0,0,230)), 'bicycle':(33,(119,11,32))}
    assert cityscapes19.codes == gta19.codes == synthia19.codes == list(t)
    for i,(k,(raw,rgb)) in enumerate(t.items()):
        for s in (cityscapes19, gta19): assert s.encode(np.array([raw]))[0] == i and s.idx(k) == [i]
        assert tuple(cityscapes19.color(i)) == rgb
    assert (cityscapes19.encode(np.arange(-1, 300))!=255).sum() == 19

def test_synthia_table():
    raw = dict(sky=1, building=2, road=3, sidewalk=4, fence=5, vegetation=6, pole=7, car=8, rider=17, person=10, bicycle=11, motorcycle=12)
    raw |= {'traffic sign':9, 'traffic light':15, 'terrain':16, 'truck':18, 'bus':19, 'train':20, 'wall':21}
    for k,v in raw.items(): assert synthia19.codes[synthia19.encode(np.array([v], np.uint16))[0]] == k
    assert (synthia19.encode(np.array([0,13,14,22,255,65535], np.uint16))==255).all()
    assert synthia19.idx('miou16') == [0,1,2,3,4,5,6,7,8,10,11,12,13,15,17,18]
    assert synthia19.idx('miou13') == [0,1,2,6,7,8,10,11,12,13,15,17,18]

def test_things():
    for s in (cityscapes19, gta19, synthia19): assert s.things == (6,7,11,12,13,14,15,16,17,18)
    for s in (camvid11, minicity11): assert [s.codes[i] for i in s.things] == ['sign','car','pedestrian','bicyclist']

def test_eleven():
    assert camvid11.codes == minicity11.codes == 'sky building pole road pavement tree sign fence car pedestrian bicyclist'.split()
    assert (camvid11.palette==minicity11.palette).all() and camvid11.palette.dtype==np.uint8
    assert camvid11.encode(np.arange(256, dtype=np.uint8)).tolist() == [*range(11), *[255]*245]

@pytest.mark.parametrize('s', spaces, ids=lambda s: s.name)
@pytest.mark.parametrize('dt', [np.uint8,np.int8,np.uint16,np.int16,np.int32,np.uint32,np.int64,np.uint64])
def test_encode(s, dt):
    i = np.iinfo(dt)
    m = np.random.RandomState(0).randint(max(i.min,-300), min(i.max,300)+1, (3,17,23)).astype(dt)
    m[0,0,:2] = i.min, i.max
    out = s.encode(m)
    assert out.dtype==np.uint8 and (out==slow_encode(s, m)).all()

def test_encode_inputs():
    m = np.array([[7,26],[255,0]], np.uint8)
    want = cityscapes19.encode(m)
    for o in (m.tolist(), torch.as_tensor(m), Image.fromarray(m), np.asfortranarray(m)): assert (cityscapes19.encode(o)==want).all()
    assert (label_space(['a','b']).encode(np.array([True,False]))==[1,0]).all()
    assert cityscapes19.encode(np.zeros((0,5), np.int32)).shape == (0,5)
    assert cityscapes19.encode(np.int32(26)) == 13
    for o in (np.zeros(3), np.array(['a']), torch.zeros(2)):
        with pytest.raises(TypeError, match='integers'): cityscapes19.encode(o)

def test_negative_and_many_to_one():
    s = label_space(['a','b'], ids={-1:0, -5:1, 7:1, 3:255})
    assert s.encode(np.array([-1,-5,7,3,0,-6,8])).tolist() == [0,1,1,255,255,255,255]
    assert label_space(['a'], ids={}).encode(np.array([0,5,-1])).tolist() == [255]*3
    assert label_space(['a','b'], ignore=254).encode(np.array([255,1], np.uint8)).tolist() == [254,1]

def test_as_train():
    for s in spaces:
        t = s.as_train()
        y = np.arange(256, dtype=np.uint8)
        assert (t.encode(y)==np.where(y<s.n, y, 255)).all() and t.codes==s.codes and t.things==s.things and t.subsets==s.subsets

def test_color():
    y = np.array([[0,18],[255,19]])
    c = cityscapes19.color(y)
    assert c.dtype==np.uint8 and c.shape==(2,2,3) and c[1].max()==0 and (cityscapes19.color(-1)==0).all()
    assert (cityscapes19.color(torch.as_tensor(y))==c).all() and (cityscapes19.color(y.astype(np.uint8))==c).all()
    back = {tuple(p):i for i,p in enumerate(cityscapes19.palette)}
    assert len(back)==19 and back[tuple(c[0,1])]==18

def test_idx():
    assert cityscapes19.idx(['car','road']) == [13,0] and cityscapes19.idx([]) == [] and cityscapes19.idx(('bus',)) == [15]
    with pytest.raises(KeyError, match="'car'"): cityscapes19.idx('cars')
    with pytest.raises(KeyError, match='no class'): cityscapes19.idx(['zzz'])

@pytest.mark.parametrize('kw,match', [
    (dict(codes=['a','b','a']), 'a appears more than once'), (dict(codes=[]), '0 classes'), (dict(codes=range(256)), '256 classes'),
    (dict(codes=['a','b'], palette=[[0,0,0]]), 'needs? 2 rows|need 2 rows'), (dict(codes=['a'], palette=[0,0,0]), '1 classes'),
    (dict(codes=['a'], palette=[[0,0,300]]), '0 to 255'), (dict(codes=['a'], palette=[[0,0,.5]]), '0 to 255'), (dict(codes=['a'], palette=[[0,0,-1]]), '0 to 255'),
    (dict(codes=['a'], ids={0:1}), 'ids'), (dict(codes=['a'], ids={0:-1}), 'ids'), (dict(codes=['a'], things=[1]), 'things'),
    (dict(codes=['a'], subsets={'x':[3]}), 'subset x'), (dict(codes=['a','b'], ignore=0), 'void'), (dict(codes=['a'], ignore=256), 'void')])
def test_refused(kw, match):
    with pytest.raises(ValueError, match=match): label_space(**kw)

def test_space():
    for s in spaces: assert space(s.name) is s and space(s.name.upper()) is s and space(s) is s
    for bad in ('kitti', None, 3):
        with pytest.raises(KeyError, match='cityscapes, gta, synthia, camvid, minicity'): space(bad)

def test_pickle_and_defaults():
    for s in spaces:
        t = pickle.loads(pickle.dumps(s))
        assert t.codes==s.codes and t.ids==s.ids and (t.palette==s.palette).all() and repr(t)==repr(s)
    assert label_space(['a']).subsets == {} and label_space(range(3)).codes == ['0','1','2'] and label_space('road').n == 1
    a,b = label_space(['a']),label_space(['a'])
    assert a.subsets is not b.subsets and a.ids is not b.ids

def test_oklab_reference():
    "Ottosson's own examples, by way of sRGB: the primaries"
    for rgb,lab in (((255,0,0), (.62796,.22486,.12585)), ((0,255,0), (.86644,-.23389,.17950)), ((0,0,255), (.45201,-.03246,-.31153)), ((0,0,0), (0,0,0))):
        assert np.abs(oklab(rgb)-lab).max() < 1e-3
    assert np.allclose(oklab([128]*3, deutan=True), oklab([128]*3), atol=1e-3)    # grey is grey to everyone

def test_distinct_colors():
    c = distinct_colors(60)
    assert c.dtype==np.uint8 and len({tuple(o) for o in c})==60
    for n in (0,1,2,11,19): assert (distinct_colors(n)==c[:n]).all()
    d = lambda p: (color_distances(p, p)+9*np.eye(len(p))).min()
    assert d(c[:19])>.095 and (c@[.299,.587,.114]).min()>=40, 'far apart, and none that looks black'
    assert d(camvid11.palette)>.1 and color_distances(c, [[0,0,0]]).min()>.05
    assert len({tuple(o) for o in distinct_colors(255)})==255

def test_imports_nothing_of_pipa():
    src = open(L.__file__).read()
    assert 'import pipa' not in src and 'from pipa' not in src and 'from .' not in src
