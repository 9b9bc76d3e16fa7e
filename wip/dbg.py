import subprocess,sys,os,time,urllib.request
from pathlib import Path
from playwright.sync_api import sync_playwright
demo="/tmp/w/bdemo2"; home=Path("/tmp/w/bhome2"); (home/"settings/@jupyterlab/notebook-extension").mkdir(parents=True,exist_ok=True)
(home/"settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
env={**os.environ,"PYTHONPATH":"/tmp/w/five","HOME":str(home),"JUPYTER_CONFIG_DIR":str(home),"JUPYTERLAB_SETTINGS_DIR":str(home/"settings")}
log=open("/tmp/w/lab.log","w")
lab=subprocess.Popen([sys.executable,"-m","jupyterlab","--ServerApp.port=9911","--ServerApp.ip=127.0.0.1","--IdentityProvider.token=","--no-browser","--allow-root","--LabApp.expose_app_in_browser=True",f"--ServerApp.root_dir={demo}"],env=env,stdout=log,stderr=log,cwd=demo)
try:
    for _ in range(120):
        try: urllib.request.urlopen("http://127.0.0.1:9911/api",timeout=5); break
        except OSError: time.sleep(.5)
    with sync_playwright() as p:
        b=p.chromium.launch(executable_path="/usr/bin/chromium",args=["--no-sandbox"]); pg=b.new_page(viewport={"width":1300,"height":1000})
        pg.on("console", lambda m: print("CONSOLE",m.type,m.text[:300]) if m.type in("error","warning") else None)
        pg.goto("http://127.0.0.1:9911/lab/tree/main.ipynb"); pg.locator(".jp-Notebook").wait_for(timeout=120000)
        pg.get_by_text("| Idle").wait_for(timeout=120000); print(pg.locator(".jp-StatusBar-Right-Side, #jp-main-statusbar").first.inner_text())
        pg.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")
        for k in range(6):
            pg.wait_for_timeout(8000)
            print(k, pg.locator("img.widget-image").count(), pg.locator(".jp-Notebook-ExecutionIndicator").evaluate_all("l=>l.map(e=>e.dataset.status)"), pg.locator(".jp-InputPrompt").all_inner_texts()[:60], pg.locator(".jp-Dialog").count())
            if pg.locator("img.widget-image").count(): break
        pg.screenshot(path="/tmp/w/fig/b1.png")
        pg.evaluate("()=>{const p=document.querySelector('.jp-WindowedPanel-outer'); p.scrollTop=p.scrollHeight}"); pg.wait_for_timeout(1500)
        pg.screenshot(path="/tmp/w/fig/b2.png")
        b.close()
finally:
    lab.terminate()
