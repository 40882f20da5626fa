"Callbacks and loggers that fastai ships, each with our learner: what can run offline does, for a method with a net of one optimizer and for one with a discriminator"
import csv
import numpy as np, pytest, torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.data import CollectDataCallback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.hook import ActivationStats, HookCallback
from fastai.callback.preds import MCDropoutCallback
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback, TrackerCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from pipa.data import folder, uda_dls
from pipa.labels import space
from pipa.learner import uda_learner
from pipa.models import light
from tiny import city, narrow, seed

codes = space('minicity').codes
pytestmark = pytest.mark.filterwarnings('ignore')   # fastai's own: no GPU, no optimizer in a file

@pytest.fixture(scope='module')
def doms(tmp_path_factory):
    home = city(tmp_path_factory.mktemp('loggers'), n=4, size=(64,64))
    return [folder(home/o/'images', home/o/'masks', codes, o) for o in ('game', 'real')]

@pytest.fixture(scope='module', autouse=True)
def cache(cache_home): pass

methods = ['source', 'pipa', pytest.param('advent', marks=pytest.mark.slow), pytest.param('mic', marks=pytest.mark.slow), pytest.param('fda+pixel', marks=pytest.mark.slow)]

def learner(doms, method, path, **kw):
    seed(); s,t = doms
    dls = uda_dls(s, t.unlabelled(), t, bs=2, size=(64,64), n=4, device='cpu', seed=0)
    return uda_learner(dls, light('mit_b0', n_out=len(codes), **narrow), method, lr=1e-3, path=path, **dict(dict(crop=(64,64), hidden=16), **kw))

class Flat(HookCallback):
    "As somebody would write one"
    def __init__(self): super().__init__(modules=None, cpu=True); self.seen = 0
    def hook(self, m, i, o): self.seen += 1

ours = dict(
    CSVLogger=lambda: CSVLogger(), SaveModel=lambda: SaveModelCallback(monitor='miou'), SaveEach=lambda: SaveModelCallback(every_epoch=True, with_opt=True), EarlyStopping=lambda: EarlyStoppingCallback(monitor='miou', patience=1),
    ReduceLROnPlateau=lambda: ReduceLROnPlateau(patience=0, min_delta=9.), Tracker=lambda: TrackerCallback(), TerminateOnNaN=lambda: TerminateOnNaNCallback(), GradientClip=lambda: GradientClip(.1),
    GradientAccumulation=lambda: GradientAccumulation(4), ShortEpoch=lambda: ShortEpochCallback(.5), BnFreeze=lambda: BnFreeze(), ParamScheduler=lambda: ParamScheduler(dict(lr=SchedCos(1e-3, 1e-4), wd=SchedCos(.01, .1), mom=SchedCos(.9, .8))),
    ActivationStats=lambda: ActivationStats(with_hist=True), Hook=lambda: Flat(), ChannelsLast=lambda: ChannelsLast(), CollectData=lambda: CollectDataCallback(), MixedPrecision=lambda: MixedPrecision(amp_mode=AMPMode.BF16),
    ShowGraph=lambda: ShowGraphCallback(), Progress=lambda: ProgressCallback())

@pytest.mark.parametrize('method', methods)
def test_no_number_of_the_optimizer_is_missing(doms, method, tmp_path):
    "Loggers write all of them"
    learn = learner(doms, method, tmp_path); learn.create_opt()
    for h in learn.opt.hypers:
        assert all(isinstance(v, (int, float, bool)) and np.isfinite(v) for v in h.values()), h

@pytest.mark.parametrize('name', ours)
@pytest.mark.parametrize('method', methods)
def test_callbacks_of_fastai(doms, name, method, tmp_path, capsys):
    learn = learner(doms, method, tmp_path); cb = ours[name]()
    if isinstance(cb, ProgressCallback): learn.remove_cb(ProgressCallback)
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit_poly(2, cbs=cb)
    assert len(learn.recorder.values) in (1,2) and (name=='ShortEpoch' or np.isfinite(learn.recorder.values[-1][0]))   # fastai records no cancelled epoch
    assert any(not torch.equal(a, b) for a,b in zip(before, learn.model.parameters())), 'nothing was learned'
    if name=='CSVLogger': assert [*csv.reader(open(tmp_path/'history.csv'))][0][:3]==['epoch', 'train_loss', 'valid_loss']
    if name=='SaveModel': assert (tmp_path/'models/model.pth').exists(); learn.load('model')
    if name=='Hook': assert cb.seen
    if name=='ActivationStats': assert len(cb.stats)
    x = doms[1].images[0]
    capsys.readouterr(); y = learn.predict(x)[0]; assert y.shape[-2:]==(64,64) and 'not finite' not in capsys.readouterr().err

def test_dropout_that_stays_on(doms, tmp_path):
    learn = learner(doms, 'source', tmp_path); learn.fit(1)
    p = learn.get_preds(dl=learn.dls.valid, cbs=[MCDropoutCallback()])[0]; assert p.isfinite().all()

@pytest.mark.parametrize('method', methods)
@pytest.mark.parametrize('kw', [dict(trace_model=False), dict(trace_model=False, log_preds=False), dict(log_preds=False)], ids=['pictures', 'numbers', 'graph'])
def test_tensorboard(doms, method, kw, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    learn = learner(doms, method, tmp_path)
    learn.fit_poly(1, cbs=TensorBoardCallback(tmp_path/'tb', **kw))
    assert [*(tmp_path/'tb').glob('events*')] and len(learn.recorder.values)==1

@pytest.mark.parametrize('how', ['fit', 'fit_one_cycle', 'fit_flat_cos', 'fine_tune', 'lr_find'])
def test_fits_of_fastai(doms, how, tmp_path):
    import fastai.callback.schedule
    learn = learner(doms, 'pipa', tmp_path)
    getattr(learn, how)(**dict(lr_find=dict(num_it=12, show_plot=False), fine_tune=dict(epochs=1)).get(how, dict(n_epoch=1)))
