"""When to steer: conditions on prompts fitted to examples, gates trained in a system prompt's place, and bounds."""
