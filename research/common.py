import torch,time,math,os,sys,warnings
warnings.simplefilter("ignore")
sys.path.insert(0,'/work/main')
import torch.nn as nn, torch.nn.functional as F
from pipeline.evaluate.frechet import frechet_distance
from pipeline.evaluate.coverage import coverage, mode_shares
from pipeline.model.encoders import load_encoder
ENC={"mnist":"mnist-cnn64","fashion":"fashion_mnist-cnn64","cifar":"cifar10-cnn64"}
def data(n):
    d=torch.load(f"/tmp/r/{n}.pt"); sc=lambda x:x.float()/127.5-1
    return d["train"],sc(d["val"])
class Measure:
    def __init__(s,n):
        s.enc=load_encoder(ENC[n]); tr,val=data(n)
        s.val=s.enc.features(val)
        g=torch.Generator().manual_seed(1)
        s.floor=frechet_distance(s.enc.features(tr[:10000].float()/127.5-1),s.val)
    def __call__(s,x,rec=True):
        f=s.enc.features(x); d=frechet_distance(f,s.val)/s.floor
        out=f"{d:8.2f}x"
        if rec:
            c=coverage(s.val,f[:5000]); sh=mode_shares(s.enc.logits(x)); out+=f" rec {c.recall:.3f} prec {c.precision:.3f} modes {min(sh)*100:.1f}-{max(sh)*100:.1f}%"
        return out
def cpu(): return time.process_time()
from pipeline.data.damage import LAWS,SCALARS
def damaged(x,strength=1.0):
    n=len(x); h,w=x.shape[2:]
    u=torch.rand(n,SCALARS+2*h*w+2*max(h,w))
    return LAWS["mixed"].damage(x,torch.randn_like(x),u,strength)
