import os,sys,subprocess,time,urllib.request,shutil
from pathlib import Path
import nbformat
from playwright.sync_api import sync_playwright
ROOT=Path("/tmp/w/five"); work=Path("/tmp/w/shot")
nb=nbformat.read(ROOT/"main.ipynb",as_version=4)
for c in nb.cells:
    if "parameters" in c.metadata.get("tags",[]): c.source='dataset, data_dir, quick, retrain = "cifar10", "/work/shared/data", True, False'
    if c.cell_type=="code": c.outputs,c.execution_count=[],None
nbformat.write(nb,work/"main.ipynb")
s=work/"settings"/"@jupyterlab"/"notebook-extension"; s.mkdir(parents=True,exist_ok=True); (s/"tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
env={**os.environ,"PYTHONPATH":str(ROOT),"HOME":"/tmp/w/shot","JUPYTER_CONFIG_DIR":"/tmp/w/shot","JUPYTERLAB_SETTINGS_DIR":str(work/"settings")}
lab=subprocess.Popen([sys.executable,"-m","jupyterlab","--ServerApp.port=18999","--ServerApp.ip=127.0.0.1","--IdentityProvider.token=","--no-browser","--allow-root","--LabApp.expose_app_in_browser=True",f"--ServerApp.root_dir={work}"],env=env,stdout=open("/tmp/w/shot.log","w"),stderr=subprocess.STDOUT,cwd=work)
try:
    for _ in range(120):
        try: urllib.request.urlopen("http://127.0.0.1:18999/api",timeout=5); break
        except OSError: time.sleep(.5)
    with sync_playwright() as p:
        b=p.chromium.launch(executable_path="/usr/bin/chromium",args=["--no-sandbox"]); page=b.new_page(viewport={"width":1300,"height":1000},device_scale_factor=1.5)
        page.goto("http://127.0.0.1:18999/lab/tree/main.ipynb",timeout=120000)
        page.locator(".jp-Notebook").wait_for(timeout=120000); page.get_by_text("| Idle").wait_for(timeout=120000)
        page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")
        pic=page.locator("img.widget-image"); pic.wait_for(state="attached",timeout=240000); pic.scroll_into_view_if_needed()
        page.wait_for_timeout(3000)
        page.locator(".jp-OutputArea-output:has(img.widget-image)").first.screenshot(path="/tmp/w/explorer.png")
        b.close()
finally: lab.terminate(); lab.wait(30)
