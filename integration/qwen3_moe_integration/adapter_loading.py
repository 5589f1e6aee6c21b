"""Adapters that are loaded again, by a Trainer that resumes or ends with its best checkpoint."""

from functools import partial

from peft import PeftModel


def load_adapters_in_place(model: PeftModel) -> PeftModel:
    """Has files of adapters loaded by way of the host, and the adapters keep their dtype.

    A Trainer has ``model.load_adapter`` fill the adapter that is trained, to resume and, with
    ``load_best_model_at_end=True``, when training is over but its memory is still taken. PEFT would read the file to
    the GPU, which has no room for another adapter by then, and make the adapter fp32 whatever it was. Arguments that a
    call of ``load_adapter`` names itself still count.

    Args:
        model: what ``get_peft_model`` or ``PeftModel.from_pretrained`` returned, or a Trainer has as its ``model``.

    Returns:
        ``model``, changed in place.

    Raises:
        TypeError: ``model`` is no ``PeftModel``.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a PeftModel, got a {type(model).__name__}; call this after get_peft_model")
    model.load_adapter = partial(model.load_adapter, torch_device="cpu", autocast_adapter_dtype=False)
    return model
