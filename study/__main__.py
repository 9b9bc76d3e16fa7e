"""The whole study, from the baselines to the tables: `python study.py --help` explains every flag."""

from utils.cli import study_script

if __name__ == "__main__":
    study_script()
