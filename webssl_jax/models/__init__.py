"""Networks: what they compute, never how they are trained. Nothing here imports the rest of the
package."""
