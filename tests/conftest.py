"The same surroundings for everybody: one thread a process, no window, nothing from the net."
import os

for k,v in dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', MPLBACKEND='Agg', HF_HUB_OFFLINE='1').items(): os.environ.setdefault(k, v)


def pytest_xdist_auto_num_workers(config):
    "One process a core, but none to spare for a single file or name: starting them takes longer than most tests"
    few = config.option.keyword or config.option.lf or config.option.usepdb or any(o.endswith('.py') or '::' in o for o in config.args)
    return 0 if few else min(os.cpu_count() or 1, 8)
