"""python fill.py: put the tables into README.md and models/README.md (from the reports), in place of @NAME@ marks or of earlier tables."""
import json,sys,re; sys.path.insert(0,'.')
from pathlib import Path
from utils import tables
from utils.robustness import read_report, checkpoint_paths
r=read_report("results/robustness.json")
diag=[json.loads(Path(f"results/diagnosis/{p.stem}.json").read_text()) for _,p in checkpoint_paths("models") if Path(f"results/diagnosis/{p.stem}.json").exists()]
blocks={"WHO":tables.robustness_table(r),"RADII":tables.radius_table(r,"pgd",**tables.PGD_20),"CHECKPOINTS":tables.robust_checkpoint_table(r),"DIAG":tables.diagnosis_table(diag) if diag else ""}
for f in ("README.md","models/README.md"):
    s=Path(f).read_text()
    for k,v in blocks.items():
        s=s.replace(f"@{k}@",v)
        head=v.split("\n")[0] if v else None
        if head: s=re.sub(re.escape(head)+r"\n(\|.*\n?)*",lambda m:v+"\n",s)
    Path(f).write_text(s)
