"A tilde is the home wherever a path is taken"
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from pipa import check, checkpoints, data, export, infer, learner
from pipa.labels import space
from pipa.models import light
from pipa.runs import plan, record, state, tables
from pipa.sets import named
from tiny import city

codes = space('minicity').codes

def test_a_tilde_is_the_home_everywhere(tmp_path, monkeypatch, own_cache):
    home = tmp_path/'home'; home.mkdir(); (tmp_path/'here').mkdir(); monkeypatch.setenv('HOME', str(home)); monkeypatch.chdir(tmp_path/'here')
    city(home/'c', n=2, size=(64,64)); (home/'codes.txt').write_text('\n'.join(codes))
    net,sp = light('mit_b0', n_out=len(codes)),space('minicity')
    # what is written
    checkpoints.save('~/o/w.safetensors', net, sp, size='64x64'); checkpoints.save_official('~/o/w.pth', net, sp)
    export.export_net('~/o/w.pt2', net, sp, (64,64), 'nothing'); plan.add_row('~/o/t.csv', dict(benchmark='x', method='source', seed=0, epochs=1, miou_student=.5, miou_teacher=.5))
    assert {o.name for o in (home/'o').iterdir()}>={'w.safetensors', 'w.pth', 'w.pt2', 't.csv'}
    # what is read
    assert checkpoints.load('~/o/w.safetensors')[0].n_out==len(codes) and checkpoints.read('~/o/w.pth')[0] and export.load_graph('~/o/w.pt2')[1]
    assert len(plan.keys_of('~/o/t.csv'))==1 and len(tables.read_results('~/o/t.csv'))==1
    s,t = (data.folder(f'~/c/{o}/images', f'~/c/{o}/masks', c) for o,c in (('game', '~/codes.txt'), ('real', Path('~/codes.txt'))))
    assert len(s)==2 and s.space.codes==codes and infer.predict(net, '~/c/game/images/0.png').shape==(64,64)
    assert infer.predict_folder(net, '~/c/game/images', '~/p', sp, progress=False)[0]==2 and (home/'p/0_labels.png').exists()
    dls = data.uda_dls(s, t.unlabelled(), t, bs=1, size=(64,64), n=1, device='cpu', resize=(64,64), resize_t=(64,64), copies='~/copies'); dls.one_batch()
    assert [*(home/'copies').glob('*.npy')]
    learn = learner.uda_learner(dls, net, 'source', path='~/run'); assert learn.path==home/'run'
    (home/'run').mkdir(); (home/'run/config.json').write_text('{"method": "source"}'); assert record.read_config('~/run')['method']=='source'
    with pytest.raises(FileNotFoundError, match='There is no checkpoint in'): state.read_state('~/run')
    check.report(check.domains_of('~/c/game/images', '~/c/game/masks', '~/codes.txt'), '~/check', n_workers=0); assert (home/'check/classes.csv').exists()
    assert len(data.minicity('game', n=1, size=(64,64), root='~/data')) and (home/'data/minicity').is_dir()
    monkeypatch.setenv('PIPA_DATA', '~/data'); assert data.minicity('game', n=1, size=(64,64)).images[0].is_relative_to(home)
    assert not [*Path('.').iterdir()]
