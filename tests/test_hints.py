"Hints of a target: clicks as a file, discs, files of annotation tools, the labelled domain, and what a run does with them"
import json, random, re, signal
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from pipa import cli
from pipa.checkpoints import load
from pipa.data import Domain, class_counts, read_mask
from pipa.hints import tools
from pipa.hints.clicks import Click, add_click, click_masks, click_names, clicks_by_image, counts, drop_click, read_clicks, write_clicks
from pipa.hints.tools import fill_, hints_of
from pipa.labels import label_space, space
from pipa.runs import run as runs
from pipa.sets.named import domains
from test_resume import command, same_folder
from tiny import city

sp = label_space(['sky','road','pavement','car'])

@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    (tmp_path/'here').mkdir(); monkeypatch.chdir(tmp_path/'here')

def picture(file, size=(60,40), hue=0, **kw):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (hue,90,200)).save(file, **kw)
    return file

def put(file, o):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(o if isinstance(o, str) else json.dumps(o), encoding='utf8')
    return file

@pytest.fixture
def target(tmp_path): return Domain([picture(tmp_path/f'target/images/town/{i}.jpg', hue=40*i) for i in range(6)], None, sp, 'target')

@pytest.fixture
def home(tmp_path, target): return tmp_path/'target'

# --- clicks -----------------------------------------------------------------------------------------------------------------------------
def test_what_is_written_is_read(tmp_path):
    rng = random.Random(0)
    letters = ['a', 'é', '"', ',', ' ', "'", '=', '-', '@', '+', ';', '\t', '雨', '#', '%']
    for _ in range(200):
        name = ''.join(rng.choice(letters) for _ in range(rng.randrange(1, 6)))
        cs = [Click(f'x{name}x/{name}x.png', rng.randrange(10**4), rng.randrange(10**4), rng.choice(sp.codes), rng.choice([0, .5, 2., 10.]))]
        cs.append(Click(f'{name.lstrip()}x.png', 0, 0, 'car'))
        write_clicks(tmp_path/'c.csv', cs)
        assert read_clicks(tmp_path/'c.csv', sp)==cs

def test_a_spreadsheet_finds_no_formula(tmp_path):
    write_clicks(tmp_path/'c.csv', [Click(o, 1, 1, '=class') for o in ('=1+1.png', '-1.png', '@a.png', "'=2.png")])
    rows = (tmp_path/'c.csv').read_text().splitlines()[1:]
    assert all(r.startswith("'") and ",'=class," in r for r in rows)
    assert [o.image for o in read_clicks(tmp_path/'c.csv', label_space(['=class','b']))]==['=1+1.png', '-1.png', '@a.png', "'=2.png"]

def test_a_file_of_clicks_comes_to_its_place_whole(tmp_path, placed):
    write_clicks(tmp_path/'c.csv', [Click('a', 1, 1, 'car')])
    assert tmp_path/'c.csv' in placed

@pytest.mark.parametrize('line,says', [
    ('a.png,1,2,raod,2', 'do you mean `road`'), ('a.png,1,2,Car,2', 'do you mean `car`'), ('a.png,1,2,xyzzy,2', 'there are sky, road, pavement, car'),
    ('a.png,nan,2,road,2', "`x` is 'nan'"), ('a.png,1,-1,road,2', "`y` is '-1'"), ('a.png,1,1e9,road,2', "`y` is"), ('a.png,1,2,road,inf', "`r` is"),
    ('a.png,one,2,road,2', "`x` is 'one'"), ('a.png,1,2,road', '4 columns in place of 5'), ('a.png,1,2,road,2,2', '6 columns'), ('a.png,,2,road,2', "`x` is ''"),
    ('../valid/a.png,1,2,road,2', 'path below the folder'), ('/etc/passwd,1,2,road,2', 'path below'), ('C:/a.png,1,2,road,2', 'path below'), (',1,2,road,2', 'path below'),
    ('"a.png,1,2,road,2', 'line')])
def test_a_line_that_cant_be_right(tmp_path, line, says):
    put(tmp_path/'c.csv', f'image,x,y,class,r\nb.png,1,1,car,2\n{line}\n')
    with pytest.raises(ValueError) as e: read_clicks(tmp_path/'c.csv', sp)
    assert says in str(e.value) and 'c.csv`, line 3' in str(e.value)

@pytest.mark.parametrize('data,says', [(b'\xff\xfe\0', 'UTF-8'), (b'a\0b', 'UTF-8'), (b'x,y\n1,2\n', 'no file of clicks'), (b'image;x;y;class;r\n', 'semicolons'),
                                       (b'image,x,y,class,image\n', 'no file of clicks'), (b'{"shapes": []}', 'no file of clicks')])
def test_a_file_that_is_none(tmp_path, data, says):
    (tmp_path/'c.csv').write_bytes(data)
    with pytest.raises(ValueError, match=says): read_clicks(tmp_path/'c.csv', sp)

def test_an_empty_file_is_no_clicks(tmp_path, target, home):
    for o in ('', '\n', 'image,x,y,class,r\n'):
        assert read_clicks(put(home/'clicks.csv', o), sp)==[] and hints_of(target, home) is None

def test_of_two_clicks_on_a_pixel_the_later_wins(tmp_path):
    a,b,c = Click('a', 3, 3, 'sky'),Click('b', 3, 3, 'sky'),Click('a', 3, 3, 'road', 1)
    write_clicks(tmp_path/'c.csv', [a,b,c])
    for cs in (read_clicks(tmp_path/'c.csv', sp), add_click(add_click([a], b), c)):
        assert cs==[b,c] and counts(cs, sp)==dict(sky=1, road=1, pavement=0, car=0)
    y = click_masks([Click('a', 3, 3, 'sky'), Click('a', 4, 3, 'road')], (8,8), sp)
    assert y[3,3]==y[3,4]==1 and y[3,1]==0   # of two discs the later lies on top

def test_the_mark_below_a_point():
    cs = [Click('a', 5, 5, 'sky'), Click('a', 6, 5, 'road'), Click('b', 5, 5, 'car')]
    assert drop_click(cs, ('a', 5, 5))==[cs[0],cs[2]] and drop_click(cs, ('a', 3, 5))==cs[1:] and drop_click(cs)==cs[:2]
    assert drop_click(cs, ('c', 5, 5))==cs==drop_click(cs, ('a', 12, 5)) and len(drop_click(cs, ('a', 12, 5), reach=4))==2

@pytest.mark.parametrize('size,hw', [((20,30), None), ((20,30), (10,15)), ((20,30), (40,45)), ((200,300), (8,12)), ((7,9), (1,1))])
def test_discs(size, hw):
    "Against two loops: a pixel is in if its middle is, and the pixel with the middle of the disc is always in"
    rng = np.random.default_rng(0)
    for r in (0, .5, 1, 2, 5.5):
        x,y = int(rng.integers(size[1])),int(rng.integers(size[0]))
        (H,W),(h,w) = size,hw or size
        want = np.full((h,w), 255)
        for i in range(h):
            for j in range(w):
                if np.hypot((i+.5)*H/h-(y+.5), (j+.5)*W/w-(x+.5))<=r+1e-7: want[i,j] = 2
        want[int((y+.5)*h/H),int((x+.5)*w/W)] = 2
        np.testing.assert_array_equal(click_masks([Click('a', x, y, 'pavement', r)], size, sp, hw), want)

# --- outlines ---------------------------------------------------------------------------------------------------------------------------
def test_polygons():
    "Against a ray from the middle of each pixel; polygons may cross themselves, and leave the picture"
    rng = np.random.default_rng(0)
    for _ in range(30):
        p = rng.uniform(-8, 24, (int(rng.integers(3, 9)),2))
        y = np.full((14,17), 255, np.uint8); fill_(y, p, 3)
        for i in range(14):
            for j in range(17):
                n = sum((a[1]>i+.5)!=(b[1]>i+.5) and j+.5>a[0]+(i+.5-a[1])*(b[0]-a[0])/(b[1]-a[1]) for a,b in zip(p, np.roll(p, -1, 0)))
                assert y[i,j]==(3 if n%2 else 255)

box = [[10,5],[30,5],[30,25],[10,25]]
square = np.full((40,60), 255); square[5:25,10:30] = 1

def labelme(**kw): return dict(version='5.4.1', flags={}, imagePath='2.jpg', imageData=None, imageHeight=40, imageWidth=60,
    shapes=[dict(label='road', points=box, group_id=None, description='', shape_type='polygon', flags={}, mask=None)]) | kw
def shape(kind, points, label='road'): return dict(label=label, points=points, group_id=None, shape_type=kind, flags={})
def coco(anns=None, **im):
    a = dict(id=1, image_id=1, category_id=2, segmentation=[sum(box, [])], area=400., bbox=[10,5,20,20], iscrowd=0)
    return dict(info={}, licenses=[], images=[dict(id=1, file_name='2.jpg', width=60, height=40)|im, dict(id=9, file_name='unknown.jpg', width=1, height=1)],
                annotations=[a|o for o in anns or [{}]], categories=[dict(id=2, name='road', supercategory=''), dict(id=3, name='lamp', supercategory='')])
def region(kind='polygonlabels', value=None, **kw):
    v = dict(points=[[x/.6, y/.4] for x,y in box], closed=True) if value is None else value
    return dict(id='x', type=kind, from_name='label', to_name='image', original_width=60, original_height=40, image_rotation=0, value=v|{kind: ['road']}) | kw
def studio(*regions, image='/data/upload/3/0a1b2c3d-2.jpg', **kw): return [dict(id=1, data=dict(image=image), file_upload='0a1b2c3d-2.jpg',
    annotations=[dict(id=1, completed_by=1, was_cancelled=False, result=[*regions] or [region()])|kw], predictions=[])]

@pytest.mark.parametrize('o', [labelme(), labelme(imagePath='..\\images\\2.jpg'), labelme(imagePath='/users/me/town/2.png', imageHeight=80, imageWidth=120, shapes=[shape('polygon', (2*np.array(box)).tolist())]),
    labelme(shapes=[shape('rectangle', [[30,25],[10,5]])]), labelme(imageHeight=None), labelme(shapes=[shape('polygon', box, 'car'), shape('polygon', box)]),
    coco(), coco([dict(segmentation=[sum(box[:2]+[[30,15],[10,15]], []), [10,15,30,15,30,25,10,25]])]), coco(width=120, height=80, file_name='a/b/town/2.png') | dict(annotations=coco([dict(segmentation=[(2*np.array(box)).ravel().tolist()])])['annotations']),
    studio(), studio(image='http://localhost:8080/data/local-files/?d=town%2F2.jpg'), studio(image='s3://bucket/town/2.jpg'), studio(region('rectanglelabels', dict(x=10/.6, y=12.5, width=20/.6, height=50, rotation=0))),
    studio(region(), dict(type='choices', value=dict(choices=['x'])))], ids=lambda o: type(o).__name__)
def test_one_box_from_each_tool(o, target, home):
    put(home/'hints/a.json', o)
    h = hints_of(target, home)
    assert [o.name for o in h.images]==['2.jpg']
    np.testing.assert_array_equal(read_mask(h.masks[0], h.space), square)
    assert '1 of 6 target images; none: sky, pavement, car' in h.said and class_counts(h).tolist()==[[0,400,0,0]]

def test_points_and_circles(target, home):
    put(home/'hints/a.json', labelme(shapes=[shape('circle', [[20,20],[20,30]]), shape('point', [[40.7,10.2]], 'sky'), shape('polygon', box, 'background')]))
    h = hints_of(target, home)
    y = read_mask(h.masks[0], h.space)
    i,j = np.mgrid[:40,:60]+.5
    d = np.hypot(i-20, j-20)
    assert (y[6:25,11:30]==255).all() and (y[(d<9.9)&(i>25)]==1).all() and (y[(d>10)&(j<35)]==255).all()
    assert (y==0).sum()==13 and y[10,40]==0 and y[8,40]==0 and y[7,40]==255
    put(home/'hints/a.json', studio(region('keypointlabels', dict(x=40.7/.6, y=10.2/.4, width=.3))))
    h = hints_of(target, home)
    assert h.said.startswith('1 click on 1 of 6') and (read_mask(h.masks[0], h.space)==1).sum()==13

@pytest.mark.parametrize('o,says', [
    (coco([dict(segmentation=dict(counts=[1,2], size=[40,60]), iscrowd=1)]), 'RLE.*export the masks as PNG'), (coco([dict(segmentation=[])]), 'box without an outline'),
    (coco([dict(category_id=3)]), 'no class `lamp`'), (coco([dict(category_id=7)]), "isn't as coco writes it"), (coco([dict(image_id=5)]), "image 5, which `images` doesn't have"),
    (coco([dict(segmentation=[[1,2,3]])]), 'no places'), (coco([dict(segmentation=[[1,2,3,4]])]), 'fewer than 3'), (coco([dict(segmentation=[[1,2,3,'x',5,6]])]), 'no places'),
    (studio(region('brushlabels', dict(format='rle', rle=[0,1]))), 'brush.*PNG'), (studio(region('ellipselabels', dict(x=1, y=1, radiusX=1, radiusY=1))), 'kind `ellipselabels`'),
    (studio(region(image_rotation=90)), 'was turned'), (studio(region(value=dict(points=[[1,2,3]]))), 'no places'), (studio(region(original_height=60, original_width=40)), 'lies on its side'),
    (labelme(shapes=[shape('mask', [[1,1],[2,2]])]), 'kind `mask`'), (labelme(shapes=[shape('polygon', box, 'raod')]), 'do you mean `road`'), (labelme(shapes=[shape('polygon', box[:2])]), 'has 2 points'),
    (labelme(imageHeight=60, imageWidth=40), 'lies on its side'), (labelme(imagePath='9.jpg'), 'no such image'), (labelme(shapes='abc'), "isn't as labelme writes it"), (labelme(shapes=[{}]), "isn't as labelme"),
    ([dict(image='2.jpg', label=[])], 'JSON-MIN'), ({}, 'unknown kind'), ([], 'unknown kind'), ('{"shapes"', 'no JSON'), ('['*10**5, 'no JSON'),
    ('{"shapes": [{"label": "road", "points": [[NaN, 1], [2, 2], [3, 3]]}], "imagePath": "2.jpg"}', 'no places'), (labelme(shapes=[shape('polygon', [[1e300,0],[0,1],[2,2]])]), 'no places'),
    ('{"shapes": [{"label": "road", "points": [[1, 1], [2, 2], [3, 3]]}], "imagePath": "2.jpg", "imageHeight": Infinity, "imageWidth": 1}', 'size of the picture'),
    (labelme(imageHeight=10**12, imageWidth=15*10**11), 'size of the picture'), (labelme(imageHeight='many'), 'size of the picture')])
def test_what_isnt_read_gets_a_sentence(o, says, target, home):
    put(home/'hints/a.json', o)
    with pytest.raises(ValueError, match=says): hints_of(target, home)

def test_cancelled_annotations_say_nothing(target, home):
    put(home/'hints/a.json', studio(was_cancelled=True)); assert hints_of(target, home) is None

def test_a_photograph_that_lies_on_its_side(tmp_path):
    "Places and masks are those of the upright picture"
    exif = Image.Exif(); exif[0x112] = 6
    d = Domain([picture(tmp_path/'t/images/a.jpg', exif=exif)], None, sp)   # stored 60 x 40, seen 40 x 60
    write_clicks(tmp_path/'t/clicks.csv', [Click('a.jpg', 35, 55, 'car', 0)])
    y = read_mask(hints_of(d, tmp_path/'t').masks[0], sp)
    assert y.shape==(60,40) and np.argwhere(y!=255).tolist()==[[55,35]]
    write_clicks(tmp_path/'t/clicks.csv', [Click('a.jpg', 55, 35, 'car', 0)])
    with pytest.raises(ValueError, match='outside of `a.jpg`, which is 40 wide and 60 high'): hints_of(d, tmp_path/'t')

# --- CVAT -------------------------------------------------------------------------------------------------------------------------------
labelmap = '# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,128::\ncar:0,0,142::\nlamp:250,170,30::\n'

def cvat(home, paint, text=labelmap, palette=False):
    put(home/'hints/job/labelmap.txt', text); put(home/'hints/job/ImageSets/Segmentation/default.txt', '2\n')
    rgb = np.zeros((40,60,3), np.uint8)
    for (i,j),c in paint.items(): rgb[i:i+10,j:j+10] = c
    im = Image.fromarray(rgb)
    for d in ('SegmentationClass', 'SegmentationObject'):
        (home/'hints/job'/d).mkdir(parents=True, exist_ok=True)
        (im.quantize(8) if palette else im).save(home/f'hints/job/{d}/2.png')

@pytest.mark.parametrize('palette', [False, True])
def test_cvat(palette, target, home):
    cvat(home, {(0,0):(128,64,128), (20,30):(0,0,142)}, palette=palette)
    h = hints_of(target, home)
    y = read_mask(h.masks[0], h.space)
    assert (y[:10,:10]==1).all() and (y[20:30,30:40]==3).all() and (y==255).sum()==2400-200   # black is no class 0
    assert h.said=='1 mask on 1 of 6 target images; none: sky, pavement'

def test_what_is_wrong_with_masks_of_cvat(target, home):
    cvat(home, {(0,0):(250,170,30)})
    with pytest.raises(ValueError, match='no class `lamp`'): hints_of(target, home)
    cvat(home, {(0,0):(1,2,3)})
    with pytest.raises(ValueError, match='no label of `labelmap.txt` has the colour 1,2,3'): hints_of(target, home)
    cvat(home, {}, labelmap+'sky:0,0,0::\n')
    with pytest.raises(ValueError, match='gives black to `sky`'): hints_of(target, home)
    cvat(home, {}, labelmap+'sky 1 2 3\n')
    with pytest.raises(ValueError, match='has the line `sky 1 2 3`'): hints_of(target, home)
    (home/'hints/job/labelmap.txt').write_text(labelmap)
    Image.new('RGB', (40,60)).save(home/'hints/job/SegmentationClass/2.png')
    with pytest.raises(ValueError, match='bring both to one size'): hints_of(target, home)

def test_background_of_cvat_is_no_class_even_if_one_is_called_so(tmp_path):
    d = Domain([picture(tmp_path/'t/images/2.jpg')], None, label_space(['background','road','car']))
    cvat(tmp_path/'t', {(0,0):(128,64,128)})
    assert (read_mask(hints_of(d, tmp_path/'t').masks[0], d.space)!=255).sum()==100

# --- the domain -------------------------------------------------------------------------------------------------------------------------
def mask(file, paint, size=(40,60)):
    y = np.full(size, 255, np.uint8)
    for (i,j),c in paint.items(): y[i:i+10,j:j+10] = c
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(y).save(file)

def test_masks_lie_below_outlines_below_clicks(target, home):
    mask(home/'hints/town/2.png', {(0,0):0, (20,20):0})
    put(home/'hints/2.json', labelme(shapes=[shape('polygon', [[20,20],[25,20],[25,30],[20,30]])]))
    write_clicks(home/'clicks.csv', [Click('images/town/2.jpg', 21, 21, 'car', 0), Click('5.jpg', 0, 0, 'sky', 0)])
    h = hints_of(target, home)
    y = read_mask(h.masks[0], h.space)
    assert (y[:10,:10]==0).all() and y[21,21]==3 and y[22,21]==1 and y[22,26]==0
    assert h.said=='2 clicks, 1 outline and 1 mask on 2 of 6 target images; none: pavement' and h.clicks==dict(sky=1, road=0, pavement=0, car=1)

def test_numbers_of_masks_are_those_of_the_data(tmp_path):
    d = Domain([picture(tmp_path/'t/images/2.jpg')], None, label_space(['road','car'], ids={7:0, 26:1, 0:255}))
    mask(tmp_path/'t/hints/2.png', {(0,0):7, (10,10):26, (20,20):0})
    h = hints_of(d, tmp_path/'t')
    assert h.pixels==dict(road=100, car=100) and class_counts(h).tolist()==[[100,100]]
    mask(tmp_path/'t/hints/2.png', {(0,0):5})
    with pytest.raises(ValueError, match='holds the value 5'): hints_of(d, tmp_path/'t')

def test_copies_of_pictures_are_no_masks(target, home):
    for i in (2,3): (home/f'hints/{i}.jpg').parent.mkdir(exist_ok=True); (home/f'hints/{i}.jpg').write_bytes(target.images[i].read_bytes())
    put(home/'hints/2.json', labelme()); put(home/'hints/README.md', 'mine')
    assert len(hints_of(target, home))==1

def test_another_folder_of_the_same_name_isnt_meant(tmp_path):
    d = Domain([picture(tmp_path/f't/images/{k}/7.png', hue=i) for i,k in enumerate(('town','park'))], None, sp)
    mask(tmp_path/'t/hints/wood/7.png', {(0,0):1})
    with pytest.raises(ValueError, match='no such image'): hints_of(d, tmp_path/'t')
    (tmp_path/'t/hints/wood').rename(tmp_path/'t/hints/park')
    assert [o.parent.name for o in hints_of(d, tmp_path/'t').images]==['park']
    mask(tmp_path/'t/hints/7.png', {(0,0):1})
    with pytest.raises(ValueError, match='`town/7.png` and `park/7.png`'): hints_of(d, tmp_path/'t')

def test_memory_holds_one_map(target, home, tmp_path, monkeypatch):
    "Masks are files, written one by one; those that are there aren't written again"
    write_clicks(home/'clicks.csv', [Click(o, 5, 5, 'road') for o in click_names(target)])
    a = hints_of(target, home)
    times = [Path(o).stat().st_mtime_ns for o in a.masks]
    assert all(Path(o).is_file() for o in a.masks) and len({*a.masks})==1   # the same label map is one file
    b = hints_of(target, home)
    assert b.masks==a.masks and [Path(o).stat().st_mtime_ns for o in b.masks]==times and b.code==a.code
    monkeypatch.setattr(tools, 'keep_file', lambda *a: False)   # a disk that takes nothing
    c = hints_of(target, home, cache=tmp_path/'other')
    assert c.masks!=a.masks and c.code==a.code and class_counts(c).tolist()==class_counts(a).tolist()
    write_clicks(home/'clicks.csv', [Click(o, 5, 5, 'road') for o in click_names(target)][1:])
    assert hints_of(target, home).code!=a.code

def test_label_maps_are_drawn_once(target, home, tmp_path, monkeypatch):
    "For the same files and clicks; another mask, click or class is another map"
    calls,real = [],tools._merged
    monkeypatch.setattr(tools, '_merged', lambda *a: calls.append(a) or real(*a))
    mask(home/'hints/2.png', {(0,0):1}); put(home/'hints/a.json', labelme(imagePath='3.jpg')); write_clicks(home/'clicks.csv', [Click('4.jpg', 5, 5, 'road')])
    def drawn_anew(): calls.clear(); h = hints_of(target, home); return len(calls),h.code,h.pixels
    n,code,pixels = drawn_anew()
    assert n==3 and drawn_anew()==(0, code, pixels)
    mask(home/'hints/2.png', {(0,0):1, (10,10):2}); assert drawn_anew()[0]==1
    write_clicks(home/'clicks.csv', [Click('4.jpg', 5, 6, 'road')]); assert drawn_anew()[0]==1
    put(home/'hints/a.json', labelme(imagePath='3.jpg', shapes=[shape('polygon', box, 'car')])); assert drawn_anew()[0]==1
    for o in (tmp_path/'xdg/pipa/hints').glob('*.json'): o.write_text('{"file": "none.png"}')
    assert drawn_anew()[0]==3
    target.space = label_space(['pavement','road','sky','car']); assert drawn_anew()[0]==3

# --- validation -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('o', [labelme(imagePath='../../valid/images/v.png'), labelme(imagePath='../../valid/images/2.jpg'), coco(file_name='valid/images/2.jpg'), studio(image='/data/valid/images/2.jpg')], ids=range(4))
def test_validation_is_never_hinted(o, target, home, tmp_path):
    v = Domain([picture(tmp_path/f'valid/images/{k}', hue=7) for k in ('v.png','2.jpg')], None, sp)
    put(home/'hints/a.json', o)
    with pytest.raises(ValueError, match='image of validation'): hints_of(target, home, v)

def test_validation_is_never_clicked(target, home, tmp_path):
    v = Domain([picture(tmp_path/f'valid/images/{k}', hue=7) for k in ('v.png','2.jpg')], None, sp)
    (tmp_path/'valid/images/copy.jpg').write_bytes(target.images[4].read_bytes())
    for name in ('v.png', 'valid/images/2.jpg'):
        with pytest.raises(ValueError, match='image of validation'): clicks_by_image([Click(name, 1, 1, 'sky')], target, v)
    v = Domain([*v.images, tmp_path/'valid/images/copy.jpg'], None, sp)
    with pytest.raises(ValueError, match='4.jpg` is an image of validation .*copy.jpg'): clicks_by_image([Click('4.jpg', 1, 1, 'sky')], target, v)
    mask(home/'hints/4.png', {(0,0):1})
    with pytest.raises(ValueError, match='image of validation'): hints_of(target, home, v)
    assert clicks_by_image([Click('2.jpg', 1, 1, 'sky')], target, v)=={2: [Click('2.jpg', 1, 1, 'sky')]}   # the target has its own

# --- runs -------------------------------------------------------------------------------------------------------------------------------
opts = dict(epochs=1, unlabelled=0, steps=2, bs=2, size='64x64', crop='64x64', start=0, thresh=.1, workers=0)

@pytest.fixture
def data(tmp_path):
    home = city(tmp_path/'city', n=4, size=(64,64))
    for a,b in (('game','source'), ('real','target')): (home/a).rename(home/b)
    for sub in ('images', 'masks'):
        (home/'valid'/sub).mkdir(parents=True)
        (home/f'target/{sub}/3.png').rename(home/f'valid/{sub}/v.png')
    put(home/'codes.txt', '\n'.join(space('minicity').codes))
    return home

def weights(out): return load(Path(out)/'weights.safetensors')

@pytest.fixture
def given(monkeypatch):
    "What `uda_learner` gets of hints"
    seen,real = [],runs.uda_learner
    def f(*a, **kw): seen.append(kw.get('hints')); return real(*a, **kw)
    monkeypatch.setattr(runs, 'uda_learner', f)
    return seen

def test_without_hints_no_label_of_the_target_is_read(data, given):
    "Poisoned masks of the target, and hints that are left out, change no bit"
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'sky')])
    cli.pipa_train('pipa', str(data), out='a', hints='off', **opts)
    for p in data.glob('target/masks/*'): p.write_bytes(b'poison')
    put(data/'target/clicks.csv', 'poison'); put(data/'target/hints/poison.json', 'poison')
    cli.pipa_train('pipa', str(data), out='b', hints='off', **opts)
    (a,m),(b,_) = weights('a'),weights('b')
    assert given==[None,None] and 'hints' not in m and all(torch.equal(u, v) for u,v in zip(a.state_dict().values(), b.state_dict().values()))
    assert 'hints' not in json.loads(Path('a/config.json').read_text())['data_stamps']

def test_hints_are_no_images_of_the_target(data):
    mask(data/'target/hints/0.png', {(0,0):1}, (64,64)); write_clicks(data/'target/clicks.csv', [])
    assert [Path(o).name for o in domains(str(data), 'pipa')[1].images]==['0.png','1.png','2.png']

def test_a_run_says_what_it_was_told(data, given, capsys):
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'sky'), Click('images/2.png', 9, 60, 'road')])
    mask(data/'target/hints/1.png', {(50,0):4}, (64,64))
    cli.pipa_train('source', str(data), out='o', **opts)
    out = capsys.readouterr().out
    assert 'Hints: 2 clicks and 1 mask on 3 of 3 target images; none: building, pole, tree' in out
    h = given[0]
    assert h.clicks['sky']==1 and h.pixels['pavement']==100
    s = json.loads(Path('o/config.json').read_text())['data_stamps']['hints']
    assert s['clicks']==dict(sky=1, road=1) and s['pixels']['pavement']==100 and s['hash']==h.code and s['files']==3
    assert weights('o')[1]['hints']==s
    r = json.loads(Path('o/row.json').read_text())
    assert (r['hints'], r['clicks'])==(h.code, 2)

def test_hints_reach_the_net(data):
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'sky')])
    for o in ('off', 'auto'): cli.pipa_train('source', str(data), out=o, hints=o, **opts)
    a,b = (weights(o)[0].state_dict().values() for o in ('off', 'auto'))
    assert not all(torch.equal(u, v) for u,v in zip(a, b))
    assert ['clicks' in Path(o, 'metrics.csv').read_text().splitlines()[0].split(',') for o in ('off', 'auto')]==[False,True]

def test_hints_from_elsewhere(data, given, tmp_path):
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'sky')])
    write_clicks(tmp_path/'mine.csv', [Click('1.png', 5, 5, 'road')])
    mask(tmp_path/'masks/2.png', {(0,0):1}, (64,64))
    for o,names in ((tmp_path/'mine.csv', ['1.png']), (tmp_path/'masks', ['2.png'])):
        cli.pipa_train('source', str(data), out='o', hints=str(o), **opts)
        assert [Path(p).name for p in given[-1].images]==names
    (tmp_path/'empty').mkdir()
    for o,says in ((tmp_path/'empty', 'holds no hint'), (tmp_path/'nowhere', 'There is no `')):
        with pytest.raises(SystemExit, match=says): cli.pipa_train('source', str(data), out='p', hints=str(o), **opts)
    assert not Path('p').exists()

def test_validation_is_refused_before_anything_is_written(data, given):
    write_clicks(data/'target/clicks.csv', [Click('v.png', 5, 5, 'sky')])
    with pytest.raises(SystemExit, match='image of validation'): cli.pipa_train('source', str(data), out='o', **opts)
    assert not Path('o').exists()

def test_an_oracle_needs_no_hints(data, given):
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'sky')])
    cli.pipa_train('oracle', str(data), out='o', **opts)
    assert given==[None]

def interrupted(out):
    "As if the run had been killed before its first checkpoint"
    for o in Path(out).iterdir():
        if o.name!='config.json': o.unlink()

def test_a_run_goes_on_with_its_hints_alone(data, given, capsys):
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'sky')])
    cli.pipa_train('source', str(data), out='o', **opts); interrupted('o')
    go_on = dict(out='o', resume=True)
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'road')])
    with pytest.raises(SystemExit, match='begun with other data: hints was 1 files'): cli.pipa_train(**go_on)
    (data/'target/clicks.csv').unlink()
    with pytest.raises(SystemExit, match='hints was 1 files, is not there'): cli.pipa_train(**go_on)
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'sky')])
    cli.pipa_train(**go_on)
    assert given[-1].clicks['sky']==1 and Path('o/row.json').exists()

def test_clicks_that_came_later_are_for_another_run(data, given):
    cli.pipa_train('source', str(data), out='o', **opts); interrupted('o')
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'sky')])
    cli.pipa_train(out='o', resume=True)
    assert given==[None,None]

def test_a_run_that_repeats_another_says_what_differs(data, given, capsys):
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'sky')])
    cli.pipa_train('source', str(data), out='o', **opts)
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'road')])
    cli.pipa_train(config='o', out='p', workers=0)
    assert 'data_stamps hints: was 1 files' in capsys.readouterr().err

# --- who heeds them beside their own loss -----------------------------------------------------------------------------------------------
def heard(monkeypatch):
    "What loader and learner get"
    seen,real,loader = [],runs.uda_learner,runs.uda_dls
    monkeypatch.setattr(runs, 'uda_dls', lambda *a, **kw: seen.append(kw.get('hints')) or loader(*a, **kw))
    monkeypatch.setattr(runs, 'uda_learner', lambda *a, **kw: seen.append(kw.get('clicks')) or real(*a, **kw))
    return seen

@pytest.mark.parametrize('listen', ['none', 'teacher', 'pixel', pytest.param('both', marks=pytest.mark.slow)])
def test_who_listens(data, monkeypatch, listen):
    "Off unless asked for; config, weights and row say so, and a run that repeats it does the same"
    seen = heard(monkeypatch)
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'sky'), Click('1.png', 30, 60, 'road')])
    kw = {} if listen=='none' else dict(listen=listen)
    cli.pipa_train('pipa', str(data), out='o', **opts, **kw)
    teacher,pixel = listen in ('teacher','both'),listen in ('pixel','both')
    assert (seen[0] is not None, bool(seen[1]))==(teacher, pixel)
    c,r,m = json.loads(Path('o/config.json').read_text()),json.loads(Path('o/row.json').read_text()),weights('o')[1]
    assert c['listen']==listen and m['hints'].get('listen', 'none')==listen and (f'listen={listen}' in r['settings'])==bool(kw)
    if listen=='both':
        cli.pipa_train(config='o', out='p', workers=0)
        assert all(torch.equal(a, b) for a,b in zip(*(weights(o)[0].state_dict().values() for o in 'op')))
        cli.pipa_train('pipa', str(data), out='q', **opts)
        assert not all(torch.equal(a, b) for a,b in zip(*(weights(o)[0].state_dict().values() for o in 'oq')))

def test_listening_that_does_nothing(data, capsys):
    write_clicks(data/'target/clicks.csv', [Click('0.png', 5, 5, 'sky')])
    for method,listen,says in (('source','teacher','has no term for it'), ('self_training','pixel','has no term for it'), ('self_training','both','has no term for it'), ('pipa','all','choose one of none, teacher, pixel, both')):
        with pytest.raises(SystemExit, match=says): cli.pipa_train(method, str(data), out='o', listen=listen, **opts)
    assert not Path('o').exists()
    cli.pipa_train('self_training', str(data), out='o', hints='off', listen='teacher', **opts)
    assert '`--listen teacher` does nothing: no hints.' in capsys.readouterr().out

# --- no click yet, and going on in the middle of an epoch -------------------------------------------------------------------------------
@pytest.mark.parametrize('text', ['', '\n', 'image,x,y,class,r\n', 'image,x,y,class,r\n0.png,5,5,,2\n'])
def test_an_empty_file_of_clicks_is_told(data, given, capsys, text):
    put(data/'target/clicks.csv', text)
    cli.pipa_train('source', str(data), out='o', **opts)
    assert capsys.readouterr().out.count('Hints: `clicks.csv` holds no click yet: the target is taken without')==1
    assert given==[None] and 'hints' not in json.loads(Path('o/config.json').read_text())['data_stamps']
    with pytest.raises(SystemExit, match='holds no hint'): cli.pipa_train('source', str(data), out='p', hints=str(data/'target/clicks.csv'), **opts)

def test_an_empty_folder_of_hints_is_told(data, capsys):
    (data/'target/hints').mkdir(); put(data/'target/clicks.csv', '')
    cli.pipa_train('source', str(data), out='o', **opts)
    assert 'Hints: `hints` holds no hint yet and `clicks.csv` holds no click yet: the' in capsys.readouterr().out

@pytest.mark.slow
def test_a_command_with_clicks_goes_on_within_an_epoch(data, tmp_path):
    "Bit for bit, with everybody listening; and not with other clicks, another listener, or none"
    kw = opts | dict(epochs=2, steps=3, unlabelled=2, method='pipa', listen='both')
    write_clicks(data/'target/clicks.csv', some := [Click('0.png', 5, 5, 'sky'), Click('2.png', 30, 60, 'road')])
    code,said = command(data, out='a', **kw); assert not code, said
    code,said = command(data, at=4, out='b', **kw)
    assert code==128+signal.SIGTERM and 'epoch 1, step 1 of 3' in said, said
    for cs,o,says in ((some[:1], {}, 'begun with other data: hints was 2 files'), ([], {}, 'hints was 2 files, .* and is not there|hints was 2 files, is not there'),
                      (some, dict(listen='teacher'), '--listen=both and not teacher'), (some, dict(hints='off'), '--hints=auto and not off')):
        write_clicks(data/'target/clicks.csv', cs)
        code,said = command(data, out='b', resume=True, **o)
        assert code==1 and re.search(says, said) and 'Traceback' not in said, said
    write_clicks(data/'target/clicks.csv', some)
    code,said = command(data, out='b', resume=True); assert not code and 'epoch 1 of 2, step 1 of 3' in said, said
    same_folder(Path('a'), Path('b'))
