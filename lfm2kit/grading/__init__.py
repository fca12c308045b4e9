"""The scheme of the assignment from which lfm2kit grew: block tests, the whole model, FP16.

Thirty points are for three blocks on one device, sixty for the whole model's speed, ranked among
all submissions, and ten for a report.  FP16 adds a tenth of the points for speed if it doubles the
speed of FP32.
"""
