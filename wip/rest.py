"""study.py restricted to some parts, so that it can be run in an order of our own: part precision"""
import sys; sys.path.insert(0,'/tmp/w/train')
from pathlib import Path
from utils.study import Study
s=Study("cifar10",models=Path("models"),scratch=Path("runs/study"),report=Path("results/study.json"),data_dir="/work/shared/data",precision=sys.argv[2])
s.todo=[(l,e) for l,e in s.todo if l.part==sys.argv[1]]
s.run()
