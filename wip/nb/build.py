"""build"""
import sys, jupytext, nbformat
from pathlib import Path
for name in sys.argv[1:]:
    src=(Path(__file__).parent/f"{name}.py").read_text()
    nb=jupytext.reads(src,fmt={"extension":".py","format_name":"percent","comment_magics":False})
    nb.metadata={"kernelspec":{"display_name":"Python 3","language":"python","name":"python3"},"language_info":{"name":"python"}}
    for i,c in enumerate(nb.cells): c["id"]=f"{name}-{i:02d}"
    nbformat.validate(nb); nbformat.write(nb,f"{name}.ipynb")
