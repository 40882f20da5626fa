"`pipa_train`, and at its end how much memory of the card it took, and how long a step"
import statistics, sys, time, torch
from fastai.callback.core import Callback
from pipa import cli
from pipa.learner import Learner

class Ticks(Callback):
    "Time from the end of a step to the end of the next"
    order,seen = 2000,[]
    def after_batch(self):
        if not self.training: return
        if torch.cuda.is_available(): torch.cuda.synchronize()
        Ticks.seen.append(time.perf_counter())

if __name__=='__main__':
    fit = Learner.fit
    def timed(self, *args, cbs=None, **kw): return fit(self, *args, cbs=[*(cbs or []), Ticks()], **kw)
    Learner.fit,sys.argv[0] = timed,'pipa_train'
    try: cli.pipa_train()
    finally:
        ts = [1000*(b-a) for a,b in zip(Ticks.seen, Ticks.seen[1:])]
        if ts: print(f'a step: {statistics.median(ts):.0f} ms, median of {len(ts)}, with the waiting for it')
        if torch.cuda.is_available():
            print(f'memory: {torch.cuda.max_memory_allocated()/2**30:.2f} GiB in tensors, {torch.cuda.max_memory_reserved()/2**30:.2f} GiB taken')
