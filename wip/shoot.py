"""shoot.py FILE.html OUT_PREFIX: full page as PNG pages of 1400 px"""
import sys
from playwright.sync_api import sync_playwright
with sync_playwright() as p:
    b=p.chromium.launch(executable_path="/usr/bin/chromium",args=["--no-sandbox"]); pg=b.new_page(viewport={"width":1000,"height":1400})
    pg.goto("file://"+sys.argv[1]); pg.wait_for_timeout(1500)
    h=pg.evaluate("document.documentElement.scrollHeight"); n=0
    for y in range(0,h,1350):
        pg.evaluate(f"window.scrollTo(0,{y})"); pg.wait_for_timeout(100); pg.screenshot(path=f"{sys.argv[2]}-{n}.png"); n+=1
    print(n,h)
