import sys; sys.path.insert(0,'/tmp/r')
from common import *
torch.set_num_threads(1)
def norm(c): return nn.GroupNorm(math.gcd(c,8),c)
class Res(nn.Module):
    def __init__(s,c):
        super().__init__(); s.b=nn.Sequential(norm(c),nn.SiLU(),nn.Conv2d(c,c,3,padding=1),norm(c),nn.SiLU(),nn.Conv2d(c,c,3,padding=1)); nn.init.zeros_(s.b[-1].weight)
    def forward(s,x): return x+s.b(x)
class Attn(nn.Module):
    def __init__(s,c,h=4):
        super().__init__(); s.n=norm(c); s.q=nn.Conv2d(c,3*c,1); s.o=nn.Conv2d(c,c,1); nn.init.zeros_(s.o.weight); s.h=h
    def forward(s,x):
        b,c,H,W=x.shape
        q,k,v=s.q(s.n(x)).reshape(b,3,s.h,c//s.h,H*W).transpose(-1,-2).unbind(1)
        return x+s.o(F.scaled_dot_product_attention(q,k,v).transpose(-1,-2).reshape(b,c,H,W))
class Net(nn.Module):
    def __init__(s,w=64,r=1,cz=8,kind="spatial",attn=True,C=3):
        super().__init__()
        A=[Attn(2*w)] if attn else []
        s.enc=nn.Sequential(nn.PixelUnshuffle(2),nn.Conv2d(4*C,w,3,padding=1),*[Res(w) for _ in range(r)],nn.PixelUnshuffle(2),nn.Conv2d(4*w,2*w,1),*[Res(2*w) for _ in range(r)],*A,norm(2*w),nn.SiLU())
        s.kind=kind
        if kind=="spatial": s.inn,s.fro=nn.Conv2d(2*w,cz,1),nn.Conv2d(cz,2*w,3,padding=1)
        else:
            s.inn=nn.Sequential(nn.Flatten(),nn.LazyLinear(cz*64)); s.fro=nn.Sequential(nn.Linear(cz*64,2*w*64),nn.Unflatten(1,(2*w,8,8)))
        A=[Attn(2*w)] if attn else []
        s.dec=nn.Sequential(*A,*[Res(2*w) for _ in range(r)],norm(2*w),nn.SiLU(),nn.Conv2d(2*w,4*w,1),nn.PixelShuffle(2),*[Res(w) for _ in range(r)],norm(w),nn.SiLU(),nn.Conv2d(w,4*C,3,padding=1),nn.PixelShuffle(2))
    def encode(s,x): return s.inn(s.enc(x))
    def decode(s,z): return s.dec(s.fro(z))
    def forward(s,x): return s.decode(s.encode(x))
if __name__=="__main__":
    name=sys.argv[6] if len(sys.argv)>6 else "cifar"; kind,cz,w,r,images=sys.argv[1],int(sys.argv[2]),int(sys.argv[3]),int(sys.argv[4]),int(sys.argv[5])
    tag=f"{name}_{kind}_z{cz}_w{w}_r{r}_{images//1000}k"
    tr,val=data(name); m=Measure(name); torch.manual_seed(0)
    net=Net(w,r,cz,kind,C=tr.shape[1]).to(memory_format=torch.channels_last); print(tag,sum(p.numel() for p in net.parameters()))
    opt=torch.optim.AdamW(net.parameters(),lr=2e-3,betas=(.9,.99)); B=64; steps=images//B; t0=cpu(); S=0
    perm=torch.cat([torch.randperm(len(tr)) for _ in range(images//len(tr)+1)])
    for i in range(steps):
        x=tr[perm[i*B:(i+1)*B]].float()/127.5-1
        y=damaged(x); lr=2e-3*min(1,(i+1)*B/10000)*(.5*(1+math.cos(math.pi*i/steps)))+1e-5
        for g in opt.param_groups: g["lr"]=lr
        with torch.autocast("cpu",torch.bfloat16):
            out=net(torch.cat([x,y]).contiguous(memory_format=torch.channels_last)).float()
            l1,l2=(out[:B]-x).abs().mean(),(out[B:]-x).abs().mean(); loss=l1+l2
        opt.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_(net.parameters(),1.); opt.step(); S+=torch.tensor([l1.item(),l2.item()])
        if (i+1)%100==0: print((i+1)*B,(S/100).tolist(),round(cpu()-t0),flush=True); S=0
    net.eval()
    with torch.no_grad():
        f=lambda x:torch.cat([net(p) for p in x.split(250)])
        ro=f(val); print(tag,"cpu",cpu()-t0,"MAE",(ro-val).abs().mean().item(),"FD f(val)",m(ro,False))
        from pipeline.data.degrade import *
        import pipeline.data.degrade as dg
    torch.save({"net":net.state_dict(),"cfg":(w,r,cz,kind)},f"/tmp/r/{tag}.pt")
