# law.py tag method seconds [opts]
import sys; sys.path.insert(0,'/tmp/r')
from common import *
torch.set_num_threads(1)
from pipeline.model.networks import ConvConfig, build_network
tag,method,secs=sys.argv[1],sys.argv[2],float(sys.argv[3]); opts=dict(a.split("=") for a in sys.argv[4:])
o=lambda k,d:type(d)(opts.get(k,d))
from pipeline.model.naign import NAIGN
M=NAIGN.from_pretrained(f"/tmp/r/runs/{tag}"); name="mnist"
tr,_=data(name); m=Measure(name)
net=M.network.eval().requires_grad_(False)
with torch.no_grad(): C0=torch.cat([net.encode(p.float()/127.5-1) for p in tr.split(500)])
cs=C0.shape[1:]; C=C0.flatten(1); code=C.shape[1]; mu=C.mean(0); U,sv,V=torch.linalg.svd(C-mu,full_matrices=False); sd=sv/math.sqrt(len(C))
D=o("dims",code); N=(C-mu)@V.T[:,:D]/sd[:D]
torch.manual_seed(o("seed",0))
w,L=o("w",512),o("L",3)
class Mlp(nn.Module):
    def __init__(s,i,out,zero=True):
        super().__init__(); s.inn,s.out=nn.Linear(i,w),nn.Linear(w,out); s.ls=nn.ModuleList(nn.Sequential(nn.LayerNorm(w),nn.Linear(w,2*w),nn.SiLU(),nn.Linear(2*w,w)) for _ in range(L))
        if zero: nn.init.zeros_(s.out.weight)
        s.fin=nn.LayerNorm(w)
    def forward(s,x):
        h=s.inn(x)
        for l in s.ls: h=h+l(h)
        return s.out(s.fin(h))
K=torch.arange(1,17)*math.pi/2
def temb(t): a=t*K; return torch.cat([a.sin(),a.cos()],1)
flow=method=="flow"
net2=Mlp(D+32 if flow else D,D,zero=flow)
from copy import deepcopy
ema=deepcopy(net2); opt=torch.optim.AdamW(net2.parameters(),lr=o("lr",1e-3),betas=(.9,.99),weight_decay=0.)
def gen(n,net,steps=8):
    g=torch.Generator().manual_seed(5); z=torch.randn(n,D,generator=g)
    with torch.no_grad():
        if not flow: return net(z)
        ts=torch.linspace(0,1,steps+1)
        for a,b in zip(ts,ts[1:]):
            v=net(torch.cat([z,temb(a.expand(n,1))],1))
            if b<1: v2=net(torch.cat([z+(b-a)*v,temb(b.expand(n,1))],1)); v=(v+v2)/2
            z=z+(b-a)*v
        return z
def report(tag2):
    n=gen(10000,ema); c=(n*sd[:D])@V[:D]+mu
    with torch.no_grad():
        x=torch.cat([net.decode(p.view(-1,*cs)) for p in c.split(500)]); x2=torch.cat([net(p) for p in x.split(500)])
    print(tag2,"decoded",m(x),"| f",m(x2),flush=True)
B=o("B",512); t0=cpu(); i=0; last=0; S_=0;cnt=0
temps=[float(t) for t in opts.get("temps",".02,.05,.2").split(",")]
P=o("pos",4096)
def drift(x,pos,temps):
    # x (B,D) detached. negatives: x themselves. returns V
    y=torch.cat([pos,x]); d=torch.cdist(x,y); n=len(pos)
    d[:,n:].fill_diagonal_(1e6)
    scale=d[:,:n].mean()/math.sqrt(1.)
    V=0
    for T in temps:
        lg=-d/(scale*T)
        A=(lg.softmax(1)*lg.softmax(0)).sqrt()
        ap,an=A[:,:n],A[:,n:]
        wp=ap*an.sum(1,keepdim=True); wn=an*ap.sum(1,keepdim=True)
        v=wp@pos-wn@x
        v=v-0  # sums of weights equal
        v=v/ (v.square().mean().sqrt()+1e-8)
        V=V+v
    return V
while True:
    el=cpu()-t0
    if el>secs: break
    fr=el/secs; lr=o("lr",1e-3)*min(1,(i+1)/200)*(.5*(1+math.cos(math.pi*fr)))
    for g in opt.param_groups: g["lr"]=lr
    if flow:
        y=N[torch.randint(len(N),(B,))]; e=torch.randn_like(y); t=torch.randn(B,1).sigmoid()
        with torch.autocast("cpu",torch.bfloat16): v=net2(torch.cat([t*y+(1-t)*e,temb(t)],1)).float()
        loss=(v-(y-e)).square().mean()
    else:
        z=torch.randn(B,D)
        with torch.autocast("cpu",torch.bfloat16): x=net2(z).float()
        xd=x.detach(); pos=N[torch.randint(len(N),(P,))]
        Vf=drift(xd,pos,temps)*o("gain",1.0)
        loss=(x-(xd+Vf)).square().mean()
        S_+=(0)
    opt.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_(net2.parameters(),1.); opt.step(); i+=1; S_+=loss.item(); cnt+=1
    dec=min(o("ema",.999),(1+i)/(10+i))
    with torch.no_grad():
        for a,b in zip(ema.parameters(),net2.parameters()): a.lerp_(b,1-dec)
    if el-last>secs/4: print(i,round(el),S_/cnt,flush=True); last=el; S_=cnt=0; report(f"  {fr:.2f}")
report(f"{tag} {method} {opts} {i} steps {round(cpu()-t0)}s")
