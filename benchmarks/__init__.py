"""What is timed, against what, at which sizes; ``docs/benchmarks.md`` says how to read it."""
