def storage_bytes(shape, storage, dtype):
    n = shape.numel()
    if storage == "int8":
        return n + 4 * shape[0]
    blocks = -(-n // 64)
    return -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4
