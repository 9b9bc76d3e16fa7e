"""python fill.py, in the repository: put the tables into README.md and models/README.md, from the reports, in place of
@NAME@ marks or of earlier tables with the same first line."""
import json, sys, re
sys.path.insert(0, ".")
from pathlib import Path
from utils import tables
from utils.robustness import checkpoint_paths, read_report, training_logs
r = read_report("results/robustness.json")
logs = training_logs(Path("models"), Path("results"))
diag = [json.loads(Path(f"results/diagnosis/{p.stem}.json").read_text()) for _, p in checkpoint_paths("models")]
agreement = json.loads(Path("results/agreement.json").read_text())
blocks = {"WHO": tables.robustness_table(r), "CHECKPOINTS": tables.robust_checkpoint_table(r),
          "DIAG": tables.diagnosis_table(diag), "AGREEMENT": tables.agreement_table(agreement), "OVERFITTING": tables.overfitting_table(logs["overfitting"])}
for f in ("README.md", "models/README.md"):
    s = Path(f).read_text()
    training = tables.training_table(logs["defenses" if f == "README.md" else "tried"])
    for k, v in {**blocks, "DEFENSES": training, "TRIED": training}.items():
        s = s.replace(f"@{k}@", v)
        s = re.sub(re.escape(v.split("\n")[0]) + r"\n(\|.*\n?)*", lambda m: v + "\n", s)
    Path(f).write_text(s)
