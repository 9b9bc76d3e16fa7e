"""AutoAttack on held-out validation images: python val_aa.py CHECKPOINT COUNT [attacks]"""
import sys,time; sys.path.insert(0,'/tmp/w/rob'); import torch, warnings
from attacks import autoattack, pgd
from utils.checkpoints import load_checkpoint
from utils.data import load_split, to_unit_range
path,count=sys.argv[1],int(sys.argv[2]); attacks=tuple(sys.argv[3].split(',')) if len(sys.argv)>3 else None
s=load_split("cifar10","validation"); net=load_checkpoint(path)
x=to_unit_range(s.images[:count]).to(memory_format=torch.channels_last); y=s.labels[:count]
t=time.time(); right=clean=m=0
for i in range(0,count,250):
    a,b=x[i:i+250],y[i:i+250]
    with torch.no_grad(): ok=net(a).argmax(1)==b
    clean+=int(ok.sum()); a,b=a[ok],b[ok]
    p=pgd(net,a,b,epsilon=8/255,steps=20,loss="margin",seed=0)
    with torch.no_grad(): left=net(p).argmax(1)==b
    m+=int(left.sum()); a,b=a[left],b[left]
    adv=autoattack(net,a,b,epsilon=8/255,**({"attacks":attacks} if attacks else {}))
    with torch.no_grad(): right+=int((net(adv).argmax(1)==b).sum())
    print(path,i+len(ok),"clean",clean/(i+len(ok)),"margin20",m/(i+len(ok)),"aa",right/(i+len(ok)),round(time.time()-t),"s",flush=True)
