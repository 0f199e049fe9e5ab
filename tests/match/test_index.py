"""The search by FAISS's brute force. On a GPU it is `knn_gpu`, whose place `knn` takes on the CPU."""

import logging
import subprocess
import sys

import pytest
import torch

from naign.match import bound, distances, method, search
from naign.match.distances import faiss_on, finds_products, load_faiss, topk
from naign.match.method import plan_search
from tests.conftest import environment
from tests.match.problems import CASES, draw, low_rank, oracle

WRAPPED = """
import ctypes, types
import faiss, numpy, torch
from contextlib import nullcontext
from faiss.contrib import torch_utils
from naign.match import distances

class OnGpu(torch.Tensor):
    is_cuda = property(lambda self: True)

def read(pointer, kind, *shape):
    place = (kind * (shape[0] * shape[1])).from_address(int(pointer))
    return numpy.frombuffer(place, kind).reshape(shape)

def bf_knn(resources, args):  # what GpuDistance.cu reads, in its terms
    assert resources == "resources" and args.metric == faiss.METRIC_INNER_PRODUCT
    assert args.device == -1 and not args.use_cuvs  # the current GPU, by kernels of FAISS
    assert args.vectorsRowMajor and args.queriesRowMajor
    assert (args.vectorType, args.queryType, args.outIndicesType) == ("bfloat16", "bfloat16", "int64")
    rows = []
    for pointer, count in ((args.queries, args.numQueries), (args.vectors, args.numVectors)):
        bits = read(pointer, ctypes.c_uint16, count, args.dims).astype(numpy.uint32) << 16
        rows.append(torch.from_numpy(bits.view(numpy.float32).copy()))
    values, columns = (rows[0] @ rows[1].T).topk(args.k)
    read(args.outDistances, ctypes.c_float, args.numQueries, args.k)[:] = values
    read(args.outIndices, ctypes.c_int64, args.numQueries, args.k)[:] = columns

faiss.GpuDistanceParams, faiss.bfKnn = types.SimpleNamespace, bf_knn
faiss.DistanceDataType_BF16, faiss.DistanceDataType_F32, faiss.IndicesDataType_I64 = "bfloat16", "float32", "int64"
for kind in ("FloatTensor", "BFloat16Tensor", "IndicesTensor"):
    setattr(torch_utils, f"swig_ptr_from_{kind}", lambda rows: rows.data_ptr())
torch_utils.using_stream, torch.cuda.device = (lambda resources: nullcontext()), lambda device: nullcontext()
faiss.knn_gpu = torch_utils.torch_replacement_knn_gpu
a, b = (torch.randint(-8, 9, (rows, 24)).bfloat16() for rows in (20, 128))
listed = distances.topk(a.as_subclass(OnGpu), b.as_subclass(OnGpu), 9, "resources")
expected = distances.topk(a, b, 9)
assert torch.equal(listed[0].as_subclass(torch.Tensor), expected[0])
assert torch.equal((a.float() @ b.float().T).gather(1, listed[1].as_subclass(torch.Tensor)), expected[0])
"""


def test_what_faiss_is_asked_for_on_a_gpu():
    """By FAISS's own wrapper for tensors, around a stand-in for its C++."""
    subprocess.run([sys.executable, "-c", WRAPPED], check=True, env=environment())


def test_the_index_settles_nearly_all_queries_alone(monkeypatch):
    asked, survivors = [], bound.survivors
    monkeypatch.setattr(bound, "survivors", lambda a, b: asked.append(len(a)) or survivors(a, b))
    queries, candidates = low_rank(0, 200)
    answer = search(queries, candidates, 0, method="indexed", neighbours=3)
    assert answer.ids.tolist() == oracle(queries, candidates, 3)[1].tolist()
    assert answer.method.startswith("indexed on 200 coordinates") and sum(asked) < len(queries) / 4
    search(queries[:5].repeat(9, 1), queries[:5].repeat(90, 1), 0, method="indexed")  # more copies than are fetched
    assert asked[-1] == 45


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_largest_products(dtype):
    a, b = draw(0, 30, 40).to(dtype), draw(1, 128, 40).to(dtype)
    values, columns = topk(a, b, 7)
    expected = (a.float() @ b.float().T).topk(7)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(columns, expected.indices)
    assert topk(a, b, 1000)[0].shape == (30, 128)


def test_a_gpu_that_finds_other_products_is_found_out():
    assert finds_products(lambda a, b: topk(a, b, 9))
    assert finds_products(lambda a, b: topk(a.bfloat16(), b.bfloat16(), 9))  # small whole numbers
    assert not finds_products(lambda a, b: (topk(a, b, 9)[0] + 1, topk(a, b, 9)[1]))
    assert not finds_products(lambda a, b: (topk(a, b, 9)[0], topk(a, b, 9)[1].roll(1, 0)))


@pytest.mark.parametrize(("capability", "problem"), [((6, 1), "compute capability 7.0"), ((9, 0), "no GPU here")])
def test_torch_searches_where_faiss_fails(capability, problem, monkeypatch, caplog):
    def fail() -> None:
        raise RuntimeError("no GPU here")

    device = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(load_faiss(), "StandardGpuResources", fail, raising=False)
    with caplog.at_level(logging.WARNING, "naign"):
        assert faiss_on.__wrapped__(device) is None
    (line,) = caplog.messages
    assert line.startswith("FAISS is not used on cuda:3, torch searches there: ") and problem in line
    assert faiss_on(torch.device("cpu")) and not faiss_on(torch.device("meta"))
    monkeypatch.delattr(load_faiss(), "StandardGpuResources")
    assert faiss_on.__wrapped__(device) is None and len(caplog.messages) == 1  # no GPU build: nothing to tell


def test_without_the_index_the_method_is_rounded(monkeypatch):
    monkeypatch.setattr("naign.match.across_ranks.faiss_on", lambda device: None)
    monkeypatch.setattr(distances, "topk", None)
    queries, candidates = CASES["near-duplicates"]
    assert torch.equal(search(queries, candidates, 0, method="indexed").ids, search(queries, candidates, 0).ids)


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_way_through_the_products_is_chosen(faster, monkeypatch):
    monkeypatch.setattr(method, "without_probe", lambda *args, **sizes: "rounded")
    monkeypatch.setattr(method, "index_is_faster", lambda device, width, dtype: faster)
    queries, candidates = draw(0, 20, 30), draw(1, 200, 30)
    chosen, frame = plan_search(queries, candidates, method="auto", expected=200)
    assert chosen == ("indexed" if faster else "rounded") and frame.basis is None
    monkeypatch.setattr(method, "without_probe", lambda method, **sizes: method)
    assert plan_search(queries, candidates, method="rounded", expected=200)[0] == "rounded"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(not hasattr(load_faiss(), "StandardGpuResources"), reason="FAISS is no GPU build")
def test_faiss_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    assert faiss_on(device) is not None and faiss_on(device) is faiss_on(device)
    assert method.index_is_faster(device, 792, torch.bfloat16) in (True, False)
    for name, (queries, candidates) in CASES.items():
        listed = search(queries.to(device), candidates.to(device), 0, method="indexed", neighbours=3).ids.cpu()
        rows = oracle(queries, candidates, 3)[1]
        assert listed[:, : rows.shape[1]].tolist() == rows.tolist(), name
