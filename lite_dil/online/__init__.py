"""On-policy training: groups of the policy's own answers, their credit, and the step on them."""
