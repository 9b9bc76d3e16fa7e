"""Every attack on baselines, the study's defence and the robust networks: `python robustness.py --help` explains."""

from utils.cli import robustness_script

if __name__ == "__main__":
    robustness_script()
