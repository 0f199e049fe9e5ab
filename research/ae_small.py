# denoising autoencoder of conv network; usage: ae_small.py set code images width depth
import sys; sys.path.insert(0,'/tmp/r')
from common import *
torch.set_num_threads(1)
from pipeline.model.networks import ConvConfig, build_network


name,code,images,width,depth=sys.argv[1],int(sys.argv[2]),int(sys.argv[3]),int(sys.argv[4]),int(sys.argv[5])
tag=f"{name}_c{code}_w{width}_d{depth}_{images//1000}k"
tr,val=data(name); m=Measure(name)
torch.manual_seed(0)
net=build_network(ConvConfig(width=width,depth=depth,code=code),tuple(tr.shape[1:])).to(memory_format=torch.channels_last)
opt=torch.optim.AdamW(net.parameters(),lr=2e-3,betas=(.9,.99))
B=128; steps=images//B; t0=cpu(); losses=0
perm=torch.cat([torch.randperm(len(tr)) for _ in range(images//len(tr)+1)])
for i in range(steps):
    ids=perm[i*B:(i+1)*B]
    x=(tr[ids].float()/127.5-1)
    y=damaged(x)
    lr=2e-3*min(1,(i+1)*B/10000)*(.5*(1+math.cos(math.pi*i/steps)))+1e-5
    for g in opt.param_groups: g["lr"]=lr
    with torch.autocast("cpu",torch.bfloat16):
        out=net(torch.cat([x,y]).contiguous(memory_format=torch.channels_last)).float()
        loss=(out[:B]-x).abs().mean()+(out[B:]-x).abs().mean()
    opt.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_(net.parameters(),1.); opt.step(); losses+=loss.item()
    if (i+1)%400==0: print(i+1,losses/400,round(cpu()-t0),flush=True); losses=0
net.eval()
with torch.no_grad():
    f=lambda x:torch.cat([net(p) for p in x.split(500)])
    r=f(val); print(tag,"cpu",cpu()-t0,"MAE",(r-val).abs().mean().item(),"FD f(val)",m(r,False))
    z=torch.cat([net.encode(p.float()/127.5-1) for p in tr.split(500)])
torch.save({"net":net.state_dict(),"codes":z,"cfg":(code,width,depth)},f"/tmp/r/{tag}.pt")
