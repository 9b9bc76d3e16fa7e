import sys, json
sys.path.insert(0,'/work/main')
from utils import tables
from utils.study import read_report
r=read_report('/work/main/results/study.json')
m={'@IN_SHORT@':tables.in_short(r),'@TABLE1@':tables.transfer_table(r,'cnn'),'@TABLE2@':tables.transfer_table(r,'cnn-lstm'),
'@TABLE3@':tables.white_box_table(r),'@TABLE4@':tables.reproduction_table(r),'@TABLE5@':tables.spread_table(r),'@MISSES@':tables.misses_text(r),
'@NETWORKS@':tables.checkpoint_table(r),'@TIMES@':tables.times_table(r)}
for t,o in (('README.tmpl','README.md'),('CARD.tmpl','models/README.md')):
    s=open('/tmp/w/wip/'+t).read()
    for k,v in m.items(): s=s.replace(k,v)
    open('/work/main/'+o,'w').write(s)
    import re; print(o, re.findall(r'@[A-Z_0-9 ]+', s))
