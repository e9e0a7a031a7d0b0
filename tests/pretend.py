"""A pretended GPU, the device "cudafake": its tensors hold their values on the CPU.

Autograd, modules, optimisers and checkpoints see a second device, and every ATen call on tensors of
mixed devices, or with a generator of the wrong device, is refused where CUDA would refuse it. It
cannot tell which kernels and dtypes CUDA lacks, how fast it is or how much memory it takes.

It uses private functions of torch and changes torch for the whole process: import it in a process
of its own, before the first backward pass, and not beside a real GPU.
"""

import contextlib
from unittest import mock

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "cudafake"  # the scripts treat every device whose name starts with "cuda" as a GPU
aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}  # between any devices
READS_BY_INDEX = {aten.index}
WRITES_BY_INDEX = {aten.index_put, aten.index_put_, aten._index_put_impl_}


class FakeTensor(torch.Tensor):
    """A tensor on the pretended GPU; .host is the CPU tensor that holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        size = host.shape, host.stride(), host.storage_offset()
        device = f"{NAME}:0"
        self = torch.Tensor._make_wrapper_subclass(cls, *size, dtype=host.dtype, device=device)
        self.host = host
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of pretend()")

    def __reduce_ex__(self, protocol):  # torch.save, as if read with map_location="cpu"
        return self.host.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        with torch.no_grad():
            copied = self.clone()
        copied = torch.nn.Parameter(copied) if isinstance(self, torch.nn.Parameter) else copied
        return memo.setdefault(id(self), copied.requires_grad_(self.requires_grad))

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.item(), spec)


class FakeGpu(TorchDispatchMode):
    """Checks and runs every ATen call in which a FakeTensor takes part."""

    rng = torch.Generator().manual_seed(0).get_state()  # of the pretended GPU's generator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        on_cpu = [x for x in tensors if type(x) is not FakeTensor]
        any_on_gpu, device = len(on_cpu) < len(tensors), kwargs.get("device")
        to_gpu = any_on_gpu if device is None else torch.device(device).type == NAME  # the result
        if not any_on_gpu and not to_gpu:
            return func(*args, **kwargs)
        if to_gpu and any(isinstance(x, torch.Generator) for x in leaves):
            raise RuntimeError(f"{func}: a generator of the CPU draws on the GPU")
        if packet in READS_BY_INDEX | WRITES_BY_INDEX:  # CPU indices are fine, other tensors not
            mixed = type(args[0]) is not FakeTensor
            if packet in WRITES_BY_INDEX:
                mixed |= type(args[2]) is not FakeTensor and args[2].dim() > 0
        else:  # CPU scalars are fine as inputs, but not to write into
            writes_to_cpu = func._schema.is_mutable and type(tensors[0]) is not FakeTensor
            mixed = writes_to_cpu or any(x.dim() for x in on_cpu)
        if any_on_gpu and on_cpu and mixed and packet not in COPIES:
            found = [(x.device.type, *x.shape) for x in tensors]
            raise RuntimeError(f"{func}: tensors on different devices: {found}")
        host_args, host_kwargs = tree_map_only(FakeTensor, lambda x: x.host, (args, kwargs))
        if device is not None:
            host_kwargs["device"] = torch.device("cpu")
            host_kwargs.pop("pin_memory", None)
        draws = to_gpu and torch.Tag.nondeterministic_seeded in func.tags
        if draws:
            cpu_rng = torch.get_rng_state()
            torch.set_rng_state(self.rng)
        out = func(*host_args, **host_kwargs)
        if draws:
            self.rng = torch.get_rng_state()
            torch.set_rng_state(cpu_rng)
        if not to_gpu:
            return out
        out = tree_map_only(torch.Tensor, FakeTensor, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


# At import, since autograd counts the devices in the first backward pass of the process.
backend_registration._setup_privateuseone_for_python_backend(NAME)
library = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
library.fallback(torch.library.fallthrough_kernel)


@contextlib.contextmanager
def pretend():
    """Within this context the device "cudafake" can be used."""
    gpu = FakeGpu()

    def seed_all(n):
        gpu.rng = torch.Generator().manual_seed(n).get_state()

    module = {
        "get_rng_state": lambda device=None: gpu.rng.clone(),
        "set_rng_state": lambda state, device=None: setattr(gpu, "rng", state.clone()),
        "manual_seed_all": seed_all,
        "get_amp_supported_dtype": lambda: [torch.bfloat16],
        "device": lambda index: contextlib.nullcontext(),
        "_is_in_bad_fork": lambda: False,
        "_initialized": True,
    }
    cuda = {name: module[name] for name in ("get_rng_state", "set_rng_state")}
    cuda["get_device_capability"] = lambda device: (9, 0)
    cuda["mem_get_info"] = lambda device: (2**30, 2**30)  # free, total
    with contextlib.ExitStack() as stack:
        for name, fake in module.items():
            setattr(getattr(torch, NAME), name, fake)
        for name, fake in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) by way of .to()
        torch.__future__.set_overwrite_module_params_on_conversion(
            True
        )  # "param.data =" loses .host
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        yield stack.enter_context(gpu)
