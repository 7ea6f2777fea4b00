"""Tables of ids spread over ranks by torchrec; the only package that knows torchrec's sharding."""
