"""Hypothesis strategies for the schemas of our files: any value that a schema allows."""

from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from msgspec import inspect


def instances(schema: type[msgspec.Struct], **fields: SearchStrategy) -> SearchStrategy:
    """Instances of a schema. fields: strategies for fields whose values depend on each other, say."""
    return _struct(inspect.type_info(schema), fields)


def _struct(info: Any, fields: dict[str, SearchStrategy]) -> SearchStrategy:
    chosen = {}
    for field in info.fields:
        if field.name in fields:
            chosen[field.name] = fields[field.name]
        elif field.name == "format":
            chosen[field.name] = st.just(field.default)
        else:
            chosen[field.name] = _values(field.type)
            if not field.required:
                default = field.default_factory() if field.default is inspect.NODEFAULT else field.default
                chosen[field.name] |= st.just(default)
    return st.builds(info.cls, **chosen)


def _values(info: Any) -> SearchStrategy:
    """Values of a type, its bounds included."""
    match info:
        case inspect.IntType():
            low, high = info.ge if info.gt is None else info.gt + 1, info.le if info.lt is None else info.lt - 1
            return st.integers(low, high)
        case inspect.FloatType():
            low, high = (info.ge if info.gt is None else info.gt), (info.le if info.lt is None else info.lt)
            return st.floats(
                low, high, exclude_min=info.gt is not None, exclude_max=info.lt is not None, allow_nan=False
            )
        case inspect.StrType(pattern=None):
            return st.text(min_size=info.min_length or 0, max_size=min(info.max_length, 10))
        case inspect.StrType(pattern=pattern) if "{64}" in pattern:  # SHA-256
            return st.binary(min_size=32, max_size=32).map(bytes.hex)
        case inspect.StrType():
            return st.from_regex(info.pattern)
        case inspect.Metadata():  # a description, say
            return _values(info.type)
        case inspect.ListType() | inspect.VarTupleType():
            kind = list if isinstance(info, inspect.ListType) else tuple
            fewest = info.min_length or 0
            return st.lists(_values(info.item_type), min_size=fewest, max_size=max(fewest, 3)).map(kind)
        case inspect.TupleType():
            return st.tuples(*map(_values, info.item_types))
        case inspect.DictType():
            return st.dictionaries(_values(info.key_type), _values(info.value_type), max_size=3)
        case inspect.UnionType():
            return st.one_of(map(_values, info.types))
        case inspect.LiteralType():
            return st.sampled_from(info.values)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.StructType():
            return _struct(info, {})
    raise NotImplementedError(f"no values of {info}")
