import torch
from pipeline.data.sources.source import Source
from pipeline.data.format.writer import pack
from pipeline.data.loader import read_split
class Rows:
    def __init__(s,x,l,n): s.x,s.l,s.n=x,l,n
    def __len__(s): return len(s.x)
    def __getitem__(s,i): return (f"{s.n}-{i:06d}",s.x[i].numpy(),int(s.l[i]))
import json
for n,name in (("mnist","mnist"),("fashion","fashion_mnist"),("cifar","cifar10")):
    x,l=read_split(f"/tmp/d/{n}","train"); g=torch.Generator().manual_seed(7); p=torch.randperm(len(x),generator=g); x,l=x[p],l[p]
    labels=tuple(json.load(open(f"/tmp/d/{n}/index.json"))["labels"])
    pack(Source(name=name,kind="image",shape=tuple(x.shape[1:]),labels=labels,splits={"train":Rows(x[5000:],l[5000:],"train"),"test":Rows(x[:5000],l[:5000],"test")}),f"/tmp/d/{n}_val",progress=False)
    print(n)
