"The committed pictures are folders as a user has them."
from pathlib import Path
import torch
from pipa.data import codes_space, folder, uda_dls

sample = Path(__file__).resolve().parents[1]/'data/sample'

def test_sample_makes_batches():
    sp = codes_space(sample/'codes.txt')
    source,valid = [folder(sample/o/'images', sample/o/'masks', sp) for o in ('source', 'valid')]
    target = folder(sample/'target/images', codes=sp)
    assert (len(source), len(target), len(valid), target.masks) == (8, 8, 4, None)
    dls = uda_dls(source, target, valid, bs=2, size=(64,128), device='cpu')
    x_s,y_s,x_t = dls.one_batch()
    assert x_s.shape==x_t.shape==(2,3,64,128) and y_s.shape==(2,64,128)
    assert (dls.counts.sum(0)>0).all(), 'the source shows every class'
    assert set(torch.unique(y_s).tolist()) <= {*range(sp.n), 255}
