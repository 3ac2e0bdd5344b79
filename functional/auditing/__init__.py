"""What a plan means: proofs, memory, traffic, findings, and the page that shows them."""
