"""Studies: the paper's tables and figures, and ablations, each as a list of jobs and what is made of their results.

jobs        a job is a command of this repository with a folder of its own; running them, over several processes too
actions     what a job's command does
study       from a configuration to jobs, tables, figures and a page
statistics  paired intervals over images, spread over seeds, corrected significance
retrain     studies that train variants; timesteps adds calibration and sweeps
"""
