"""`tf.train.Example` messages, written by Google's own library for Protocol Buffers."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

FIELD = descriptor_pb2.FieldDescriptorProto
LISTS = {"Bytes": FIELD.TYPE_BYTES, "Float": FIELD.TYPE_FLOAT, "Int64": FIELD.TYPE_INT64}


def _example_class() -> Any:
    """The message as tensorflow/core/example/*.proto declare it."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(where: Any, name: str, *fields: tuple[str, int, str | None], repeated=False):
        made = where.add(name=name)
        for number, (field, kind, of) in enumerate(fields, start=1):
            label = FIELD.LABEL_REPEATED if repeated else FIELD.LABEL_OPTIONAL
            made.field.add(name=field, number=number, type=kind, type_name=of, label=label)
        return made

    for name, kind in LISTS.items():
        message(file.message_type, f"{name}List", ("value", kind, None), repeated=True)
    part = FIELD.TYPE_MESSAGE
    kinds = [(f"{name.lower()}_list", part, f".t.{name}List") for name in LISTS]
    feature = message(file.message_type, "Feature", *kinds)
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    entries = ("feature", part, ".t.Features.FeatureEntry")
    features = message(file.message_type, "Features", entries, repeated=True)
    key, value = ("key", FIELD.TYPE_STRING, None), ("value", part, ".t.Feature")
    message(features.nested_type, "FeatureEntry", key, value).options.map_entry = True
    message(file.message_type, "Example", ("features", part, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = _example_class()


def as_example(features: dict[str, list[Any]]) -> bytes:
    """A message with lists of texts or bytes, of floats, or of integers."""
    made = Example()
    for name, values in features.items():
        feature = made.features.feature[name]
        if isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        elif isinstance(values[0], float):
            feature.float_list.value.extend(values)
        else:
            feature.bytes_list.value.extend(v.encode() if isinstance(v, str) else v for v in values)
    return made.SerializeToString()
