import torch
from pipeline.data.loader import read_split
for n in ("mnist","fashion","cifar"):
    tr,ltr=read_split(f"/tmp/d/{n}","train"); te,_=read_split(f"/tmp/d/{n}","test")
    g=torch.Generator().manual_seed(7); p=torch.randperm(len(tr),generator=g)
    tr=tr[p]
    torch.save({"train":tr[5000:].clone(),"val":tr[:5000].clone(),"test":te},f"/tmp/r/{n}.pt")
    print(n,tr.shape,tr.dtype,te.shape)
