"""How a bank is laid out: the names of its tensors, the shards they lie in, what they become in an assembled T5. No tensors.

The originals and all that surrounds the layers have a T5's names; the modules are `<side>.bank.<granularity>.<index>`, and what a bank
has of its own beside modules is `<side>.bank.<name in a T5>`. Layers of a side are alike, so the tensors of a T5 with one layer a side
say what all tensors of a bank are called and how large they are; these functions are given them as `one_layer`.
"""

from collections.abc import Container, Iterable, Mapping

from .assembly_modular_t5 import SIDES, AssemblyPlan
from .choosing_modular_t5 import BankShape
from .configuration_modular_t5 import INITIALIZATIONS, OWN_PARTS, ModularT5Config


# In the first original layer of each side, and what every plan uses.
BIAS_TABLE = "layer.0.SelfAttention.relative_attention_bias.weight"

SHARED = "shared.weight"
HEAD = "lm_head.weight"
# Names of one tensor: the embeddings, and where it is tied to them, the head.
EMBEDDINGS = (SHARED, *(f"{side}.embed_tokens.weight" for side in SIDES))


def block_name(side: str, start: int, span: int) -> str:
    """Of the original layer `start`, or of the module for `span` layers from `start` on."""
    return f"{side}.block.{start}" if span == 1 else f"{side}.bank.{span}.{start // span}"


def is_bank_tensor(name: str) -> bool:
    """Whether a tensor is of what a bank adds to its teacher."""
    return ".bank." in name


def own_part_of(name: str) -> str | None:
    """Which of `OWN_PARTS` a tensor of a bank belongs to."""
    return next((part for part, module in OWN_PARTS.items() if f".bank.{module}." in name), None)


def shard_of(name: str) -> str:
    """Which shard of a saved bank a tensor lies in: `common`, `own`, `<side>-original` or `<side>-modules-<granularity>`."""
    side, _, rest = name.partition(".")
    if own_part_of(name):
        return "own"
    if rest.startswith("bank."):
        return f"{side}-modules-{rest.split('.')[1]}"
    return f"{side}-original" if rest.startswith("block.") and not name.endswith(BIAS_TABLE) else "common"


def shaped_like(name: str) -> str:
    """The tensor of a one-layer T5 that a tensor of a bank has the shape of."""
    side, kind, *rest = name.split(".")
    if part := own_part_of(name):
        return HEAD if part == "head" else f"{side}.{'.'.join(rest)}"
    if kind == "block":
        return f"{side}.block.0.{'.'.join(rest[1:])}"
    return f"{side}.block.0.{'.'.join(rest[2:])}" if kind == "bank" else name


def initial_name(name: str, config: ModularT5Config) -> str:
    """The teacher's tensor that a tensor of a module started as a copy of."""
    side, _, s, index, *rest = name.split(".")
    start = int(s) * int(index)
    return ".".join([block_name(side, start + INITIALIZATIONS[config.initialization](start, int(s)), 1), *rest])


def tensor_names(one_layer: Iterable[str], config: ModularT5Config) -> list[str]:
    """The names of all tensors of a bank."""
    names, layers = [], {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
    for name in one_layer:
        side, kind, *rest = name.split(".")
        if kind != "block" or name.endswith(BIAS_TABLE):
            names.append(name)
            continue
        for span in (1, *config.granularities[side]):
            names += [".".join([block_name(side, start, span), *rest[1:]]) for start in range(0, layers[side], span)]
    return names + [f"{side}.bank.{module}.weight" for side, module in _own_parts(config)]


def _own_parts(config: ModularT5Config) -> list[tuple[str, str]]:
    """`(side, name in its bank)` of what a bank has of its own beside modules; embeddings and head lie with the decoder."""
    sides = {"embeddings": ["decoder"], "final_norms": SIDES, "head": ["decoder"]}
    return [(side, module) for part, module in OWN_PARTS.items() if part in config.own_parts for side in sides[part]]


def running_own_parts(plan: AssemblyPlan, config: ModularT5Config) -> list[tuple[str, str]]:
    """`(side, name in its bank)` of what a plan runs of the bank's own: norms and head of sides with modules, embeddings if either has."""
    with_modules = [side for side in SIDES if set(plan.spans(side)) != {1}]
    return [
        (side, module)
        for side, module in _own_parts(config)
        if side in with_modules or (module == OWN_PARTS["embeddings"] and with_modules)
    ]


def parameter_map(one_layer: Iterable[str], plan: AssemblyPlan, config: ModularT5Config) -> dict[str, str]:
    """`{parameter name in the T5 assembled by a plan: parameter name in the bank}`: assembling is renaming."""
    mapping = {}
    for name in one_layer:
        side, kind, *rest = name.split(".")
        if kind != "block" or name.endswith(BIAS_TABLE):
            mapping[name] = name
            continue
        for position, (start, span) in enumerate(plan.blocks(side)):
            mapping[".".join([side, "block", str(position), *rest[1:]])] = ".".join([block_name(side, start, span), *rest[1:]])
    tied = {*EMBEDDINGS, *([HEAD] if config.tie_word_embeddings else [])}
    for side, module in running_own_parts(plan, config):
        replaced = {
            OWN_PARTS["embeddings"]: mapping.keys() & tied,
            OWN_PARTS["final_norms"]: {f"{side}.{module}.weight"},
            OWN_PARTS["head"]: {HEAD},
        }
        mapping |= dict.fromkeys(replaced[module], f"{side}.bank.{module}.weight")
    return mapping


def bank_shape(one_layer: Mapping[str, int], config: ModularT5Config, bytes_per_parameter: int, wide: Container[str] = ()) -> BankShape:
    """The counts that choosing a plan works with.

    Args:
        one_layer: of each tensor its parameters, a tied head left out.
        wide: tensors of blocks that have four bytes a parameter all the same.
    """
    of_blocks = {name: count for name, count in one_layer.items() if ".block." in name and not name.endswith(BIAS_TABLE)}
    block_parameters = {side: sum(count for name, count in of_blocks.items() if name.startswith(side)) for side in SIDES}
    wide_parameters = {side: sum(count for name, count in of_blocks.items() if name.startswith(side) and name in wide) for side in SIDES}
    return BankShape(
        num_layers={"encoder": config.num_layers, "decoder": config.num_decoder_layers},
        granularities={side: tuple(config.granularities[side]) for side in SIDES},
        block_parameters=block_parameters,
        shared_parameters=sum(count for name, count in one_layer.items() if name not in of_blocks),
        # A head of the bank's own takes the place of one that is the embeddings, which then cost extra.
        own_head_parameters=one_layer[SHARED] if "head" in config.own_parts and HEAD not in one_layer else 0,
        bytes_per_parameter=bytes_per_parameter,
        wide_parameters=wide_parameters,
        calibration=config.calibration,
    )
