"""One page of runs, sweeps, experiments and analyses. At the top: only the command line imports it."""
