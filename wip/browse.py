import subprocess,sys,os,time,urllib.request
from playwright.sync_api import sync_playwright
import nbformat
demo="/tmp/w/bdemo"; os.makedirs(demo,exist_ok=True)
nb=nbformat.read("/tmp/w/five/main.ipynb",4)
for c in nb.cells:
    if "parameters" in c.metadata.get("tags",[]): c.source='dataset, data_dir, quick, retrain = "digits", None, True, False'
nbformat.write(nb,demo+"/main.ipynb")
import glob
src=sorted(glob.glob("/tmp/pytest-of-root/pytest-*/demo0"),key=os.path.getmtime)[-1]; print(src)
subprocess.run(["cp","-r",src+"/results",demo])
env={**os.environ,"PYTHONPATH":"/tmp/w/five","HOME":"/tmp/w/bhome"}; os.makedirs("/tmp/w/bhome",exist_ok=True)
log=open("/tmp/w/lab.log","w")
lab=subprocess.Popen([sys.executable,"-m","jupyterlab","--ServerApp.port=9911","--ServerApp.ip=127.0.0.1","--IdentityProvider.token=","--no-browser","--allow-root","--LabApp.expose_app_in_browser=True",f"--ServerApp.root_dir={demo}"],env=env,stdout=log,stderr=log,cwd=demo)
try:
    for _ in range(120):
        try: urllib.request.urlopen("http://127.0.0.1:9911/api",timeout=5); break
        except OSError: time.sleep(.5)
    with sync_playwright() as p:
        b=p.chromium.launch(executable_path="/usr/bin/chromium",args=["--no-sandbox"]); pg=b.new_page(viewport={"width":1300,"height":1000})
        t=time.time(); pg.goto("http://127.0.0.1:9911/lab/tree/main.ipynb"); pg.locator(".jp-Notebook").wait_for(timeout=120000)
        pg.wait_for_timeout(4000); pg.screenshot(path="/tmp/w/peek/b1.png"); print(time.time()-t)
        print(pg.evaluate("typeof jupyterapp"))
        print(pg.locator(".jp-Notebook-ExecutionIndicator").evaluate_all("l=>l.map(e=>e.outerHTML.slice(0,300))"))
        pg.evaluate("() => {jupyterapp.commands.execute('notebook:run-all-cells')}")
        for k in range(12):
            pg.wait_for_timeout(5000); n=pg.locator("img.widget-image").count(); print(k,n, pg.locator(".jp-Notebook-ExecutionIndicator").evaluate_all("l=>l.map(e=>e.dataset.status)"))
            if n: break
            pg.locator(".jp-WindowedPanel-outer").first.evaluate("e=>{e.scrollTop=e.scrollHeight}")
        pg.screenshot(path="/tmp/w/peek/b2.png")
        b.close()
finally:
    lab.terminate()
