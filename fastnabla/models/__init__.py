"""The networks of a run: policy, flow network, decoder, and the pipeline they come from."""
