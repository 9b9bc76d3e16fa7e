import json,sys
sys.path.insert(0,'/work/main')
from utils.paper import *
r=json.load(open('/tmp/w/train/results/study.json'))
for e in r["networks"]:
    n,ep=e["network"],e["training_epsilon"]
    print(e["name"],'val',e["validation_accuracy"],'train s',e["training_seconds"],'eval s',e["evaluation_seconds"],e.get("adversarial_set_seconds"))
    print('  transfer ',[f"{100*x['accuracy']:.2f}" for x in e["transfer"]])
    print('  white-box',[f"{100*x['accuracy']:.2f}" for x in e["white_box"]])
    if e["part"]!="spread": print('  best     ',[f"{max(a,b):.2f}" + (' MISS' if ep and max(a,b)>100*x['accuracy'] else '') for a,b,x in zip(PRINTED[n][ep],REMEASURED[n][ep],e["transfer"])])
