# flow_cifar.py aetag model secs opts
import sys; sys.path.insert(0,'/tmp/r')
from common import *
from ae_cifar import Net, Res, Attn, norm
torch.set_num_threads(1)
from copy import deepcopy
tag,method,secs=sys.argv[1],sys.argv[2],float(sys.argv[3]); opts=dict(a.split("=") for a in sys.argv[4:])
o=lambda k,d:type(d)(opts.get(k,d))
name=o("set",tag.split("_")[0] if tag!="pixels" else "cifar"); tr,val=data(name); m=Measure(name); torch.manual_seed(0)
if tag!="pixels":
    S=torch.load(f"/tmp/r/{tag}.pt"); w,r,cz,kind=S["cfg"]; net=Net(w,r,cz,kind,C=tr.shape[1]); net.load_state_dict(S["net"]); net.eval().requires_grad_(False)
    net=net.to(memory_format=torch.channels_last)
    import os
    cf=f"/tmp/r/{tag}.codes.pt"
    if not os.path.exists(cf):
        with torch.no_grad():
            C=torch.cat([torch.cat([net.encode(p.float()/127.5-1) for p in tr.split(250)]), torch.cat([net.encode(p.float().flip(3)/127.5-1) for p in tr.split(250)])]); torch.save(C,cf)
    C=torch.load(cf)
    if C.ndim==2: C=C.view(len(C),-1,8,8)
    if not o("flip",1): C=C[:len(tr)]
    with torch.no_grad(): print("FD f(val)",m(torch.cat([net(p) for p in val.split(250)]),False))
else:
    C=None
shape=(3,32,32) if C is None else tuple(C.shape[1:])
if C is not None:
    if method=="mlp":
        X=C.flatten(1); mu=X.mean(0); U,sv,V=torch.linalg.svd((X-mu)[torch.randperm(len(X))[:30000]],full_matrices=False); sd=sv/math.sqrt(30000)
        D=o("dims",X.shape[1]); 
        whiten=lambda c:((c.flatten(1)-mu)@V.T[:,:D])/sd[:D]
        unwhiten=lambda n:((n*sd[:D])@V[:D]+mu).view(-1,*shape)
        print("PCA var kept",(sd[:D]**2).sum()/(sd**2).sum(), "sd ratio",sd[0]/sd[-1])
    else:
        mu=C.mean((0,2,3),keepdim=True); X=(C-mu).transpose(0,1).flatten(1); cov=X@X.T/X.shape[1]; ev,E=torch.linalg.eigh(cov)
        Wm=(E/ev.sqrt())@E.T; Wi=(E*ev.sqrt())@E.T
        whiten=lambda c:torch.einsum("ij,njhw->nihw",Wm,c-mu); unwhiten=lambda n:torch.einsum("ij,njhw->nihw",Wi,n)+mu
    N=torch.cat([whiten(c) for c in C.split(10000)])
    print("codes",tuple(C.shape),"std",C.std().item())
w=o("w",256); L=o("L",6)
K=torch.arange(1,33)*math.pi/2
def temb(t): a=t.view(-1,1)*K; return torch.cat([a.sin(),a.cos()],1)
class Block(nn.Module):
    def __init__(s,d,h):
        super().__init__(); s.n1,s.n2=nn.LayerNorm(d,elementwise_affine=False),nn.LayerNorm(d,elementwise_affine=False); s.qkv,s.o=nn.Linear(d,3*d),nn.Linear(d,d); s.a,s.b=nn.Linear(d,4*d),nn.Linear(4*d,d); s.h=h
        s.ada=nn.Linear(d,6*d); nn.init.zeros_(s.ada.weight); nn.init.zeros_(s.ada.bias)
    def forward(s,x,c):
        a1,b1,g1,a2,b2,g2=s.ada(c)[:,None].chunk(6,-1); n,T,d=x.shape
        q,k,v=s.qkv(s.n1(x)*(1+a1)+b1).view(n,T,3,s.h,d//s.h).permute(2,0,3,1,4)
        x=x+g1*s.o(F.scaled_dot_product_attention(q,k,v).transpose(1,2).reshape(n,T,d))
        return x+g2*s.b(F.gelu(s.a(s.n2(x)*(1+a2)+b2),approximate="tanh"))
class Dit(nn.Module):
    def __init__(s,shape,d,L,patch=1,h=4):
        super().__init__(); c,H,W=shape; s.p=patch; T=(H//patch)*(W//patch); s.inn=nn.Linear(c*patch*patch,d); s.pos=nn.Parameter(.02*torch.randn(T,d)); s.t=nn.Sequential(nn.Linear(64,d),nn.SiLU(),nn.Linear(d,d),nn.SiLU())
        s.bl=nn.ModuleList(Block(d,h) for _ in range(L)); s.fin=nn.LayerNorm(d,elementwise_affine=False); s.ada=nn.Linear(d,2*d); s.out=nn.Linear(d,c*patch*patch); nn.init.zeros_(s.out.weight); s.shape=shape
    def forward(s,x,t):
        n=len(x); x=F.pixel_unshuffle(x,s.p).flatten(2).transpose(1,2) if s.p>1 else x.flatten(2).transpose(1,2)
        h=s.inn(x)+s.pos; c=s.t(temb(t))
        for b in s.bl: h=b(h,c)
        a,b=s.ada(c)[:,None].chunk(2,-1); h=s.out(s.fin(h)*(1+a)+b).transpose(1,2)
        H=s.shape[1]//s.p; h=h.reshape(n,-1,H,H)
        return F.pixel_shuffle(h,s.p) if s.p>1 else h
class Mlp(nn.Module):
    def __init__(s,D,w,L):
        super().__init__(); s.inn,s.out=nn.Linear(D+64,w),nn.Linear(w,D); s.ls=nn.ModuleList(nn.Sequential(nn.LayerNorm(w),nn.Linear(w,2*w),nn.SiLU(),nn.Linear(2*w,w)) for _ in range(L)); nn.init.zeros_(s.out.weight); s.fin=nn.LayerNorm(w)
    def forward(s,x,t):
        h=s.inn(torch.cat([x,temb(t)],1))
        for l in s.ls: h=h+l(h)
        return s.out(s.fin(h))
class TRes(nn.Module):
    def __init__(s,i,c,d):
        super().__init__(); s.n1,s.c1,s.n2,s.c2=norm(i),nn.Conv2d(i,c,3,padding=1),norm(c),nn.Conv2d(c,c,3,padding=1); s.e=nn.Linear(d,c); nn.init.zeros_(s.c2.weight); s.sk=nn.Conv2d(i,c,1) if i!=c else nn.Identity()
    def forward(s,x,c): return s.sk(x)+s.c2(F.silu(s.n2(s.c1(F.silu(s.n1(x)))+s.e(c)[:,:,None,None])))
class UNet(nn.Module):
    def __init__(s,shape,w,first=2):
        super().__init__(); c=shape[0]; d=4*w; s.f=first
        s.t=nn.Sequential(nn.Linear(64,d),nn.SiLU(),nn.Linear(d,d),nn.SiLU())
        s.inn=nn.Conv2d(c*first*first,w,3,padding=1); s.d1=TRes(w,w,d); s.d2=nn.Conv2d(w,2*w,2,stride=2); s.e1=TRes(2*w,2*w,d); s.e2=nn.Conv2d(2*w,4*w,2,stride=2); s.m1=TRes(4*w,4*w,d); s.ma=Attn(4*w); s.m2=TRes(4*w,4*w,d)
        s.u2=nn.Conv2d(4*w,8*w,1); s.f1=TRes(4*w,2*w,d); s.u1=nn.Conv2d(2*w,4*w,1); s.g1=TRes(2*w,w,d); s.o=nn.Sequential(norm(w),nn.SiLU(),nn.Conv2d(w,c*first*first,3,padding=1)); nn.init.zeros_(s.o[-1].weight)
        s.at=Attn(2*w)
    def forward(s,x,t):
        h0=x.shape[-1]; x=F.pad(x,(0,-h0%(4*s.f),0,-h0%(4*s.f))); return s.body(x,t)[...,:h0,:h0]
    def body(s,x,t):
        c=s.t(temb(t)); a=s.d1(s.inn(F.pixel_unshuffle(x,s.f)),c); b=s.at(s.e1(s.d2(a),c)); h=s.m2(s.ma(s.m1(s.e2(b),c)),c)
        h=s.f1(torch.cat([F.pixel_shuffle(s.u2(h),2),b],1),c); h=s.g1(torch.cat([F.pixel_shuffle(s.u1(h),2),a],1),c)
        return F.pixel_shuffle(s.o(h),s.f)
class Prod(nn.Module):
    def __init__(s):
        super().__init__()
        from pipeline.model.flow import SpatialVelocity
        s.v=SpatialVelocity(shape,w,o("L",1))
    def forward(s,x,t): return s.v(x,t.view(-1))
model={"mlp":lambda:Mlp(D,w,L),"dit":lambda:Dit(shape,w,L,o("patch",1)),"unet":lambda:UNet(shape,w,o("first",2)),"prod":lambda:Prod()}[method]()
if method in("unet","prod"): model=model.to(memory_format=torch.channels_last)
print(tag,method,opts,"params",sum(p.numel() for p in model.parameters()),flush=True)
ema=deepcopy(model); opt=torch.optim.AdamW(model.parameters(),lr=o("lr",1e-3),betas=(.9,.99),weight_decay=0.)
gs=(D,) if method=="mlp" else shape
def gen(n,steps,order=2,bs=500):
    g=torch.Generator().manual_seed(5); outs=[]
    for zz in torch.randn(n,*gs,generator=g).split(bs):
        z=zz
        with torch.no_grad(), torch.autocast("cpu",torch.bfloat16):
            ts=torch.linspace(0,1,steps+1)
            for a,b in zip(ts,ts[1:]):
                v=ema(z,a.expand(len(z),1)).float()
                if b<1 and order==2: v=(v+ema(z+(b-a)*v,b.expand(len(z),1)).float())/2
                z=z+(b-a)*v
        outs.append(z)
    return torch.cat(outs)
def report(t2,n=2000,sets=((10,2),)):
    for st,od in sets:
        z=gen(n,st,od)
        if C is None: print(t2,st,od,"|",m(z.clamp(-1,1)),flush=True); X=z.clamp(-1,1); continue
        with torch.no_grad(): x=torch.cat([net.decode(p) for p in unwhiten(z).split(250)]); x2=torch.cat([net(p) for p in x.split(250)])
        print(t2,st,od,"decoded",m(x),"| f",m(x2),flush=True); X=x
    from PIL import Image
    q=(X[:64].permute(0,2,3,1)*127.5+127.5).clamp(0,255).byte(); h=q.shape[1]; q=q.view(8,8,h,h,-1).permute(0,2,1,3,4).reshape(8*h,8*h,-1)
    Image.fromarray(q.squeeze(-1).numpy()).resize((16*h,16*h)).save(f"/tmp/r/{tag}_{method}_{o('name','')}.png")
B=o("B",256); t0=cpu(); i=0; last=0; Sm=cnt=0
while True:
    el=cpu()-t0
    if el>secs: break
    fr=el/secs; lr=o("lr",1e-3)*min(1,(i+1)/300)*(.5*(1+math.cos(math.pi*fr))+.01)
    for g in opt.param_groups: g["lr"]=lr
    if C is None:
        y=tr[torch.randint(len(tr),(B,))].float()/127.5-1
        fl=torch.rand(B)<.5; y[fl]=y[fl].flip(3)
    else: y=N[torch.randint(len(N),(B,))]
    e=torch.randn_like(y); t=torch.randn(B,1).sigmoid() if not o("shift",0.) else (torch.randn(B,1)-o("shift",0.)).sigmoid()
    tt=t.view(-1,*[1]*(y.ndim-1))
    with torch.autocast("cpu",torch.bfloat16): v=model(tt*y+(1-tt)*e,t).float()
    loss=(v-(y-e)).square().mean()
    opt.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_(model.parameters(),1.); opt.step(); i+=1; Sm+=loss.item(); cnt+=1
    dec=min(o("ema",.999),(1+i)/(10+i))
    with torch.no_grad(): torch._foreach_lerp_(list(ema.parameters()),list(model.parameters()),1-dec)
    if el-last>secs/4: print(i,i*B,round(el),Sm/cnt,flush=True); last=el; Sm=cnt=0; q0=cpu(); report(f"  {fr:.2f}"); t0+=cpu()-q0
print(i,i*B,round(cpu()-t0)); report("final",o("n",4000),((10,2),(10,1),(4,1)) if C is None else ((10,2),(10,1)))
torch.save({"ema":ema.state_dict()},f"/tmp/r/{tag}_{method}_{o('name','')}.flow.pt")
