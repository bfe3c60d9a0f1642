"""Other scripts' models, optimizers and schedules, without what these scripts do when they run."""

import ast
import sys
import types
from pathlib import Path

KEPT = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)


def definitions(path):
    """The imports, classes and functions at the top level of a script, as one module. Imports of
    what stands beside the script, or is not installed, are left out."""
    module = types.ModuleType(Path(path).resolve().parent.name)
    sys.modules[module.__name__] = module  # for its dataclasses
    # what the scripts set when they run; FLASH turns on llm.c's fused attention
    module.__dict__.update(master_process=False, FLASH=1, print0=lambda *_: None)
    for node in ast.parse(Path(path).read_text()).body:
        if isinstance(node, KEPT) and getattr(node, "module", "") != "hellaswag":
            try:
                code = ast.Module([node], type_ignores=[])
                exec(compile(code, path, "exec"), module.__dict__)
            except ImportError:
                pass
    return module


def schedule(path, constants):
    """The get_lr of a script, or of the train.py beside it, with the given constants."""
    for script in (Path(path), Path(path).with_name("train.py")):
        module = definitions(str(script))
        if hasattr(module, "get_lr"):
            module.__dict__.update(constants)
            return module.get_lr
    sys.exit(f"{path}: there is no get_lr in it, nor in a train.py beside it")


def make_optimizer(module, model, device, betas=(0.9, 0.95), weight_decay=0.1):
    """The optimizer that a script makes for its model."""
    how = {"weight_decay": weight_decay, "learning_rate": 1e-4, "device_type": device}
    known = module.GPT.configure_optimizers.__code__.co_varnames
    for name, value in (("betas", betas), ("zero_stage", 0)):
        if name in known:
            how[name] = value
    return model.configure_optimizers(**how)
