"""Every number that was chosen by measuring, with what it was measured on: two cores with AVX-512, torch 2.13.

Change one, and `benchmarks/cost/clip.py` tells what it does to time, `tests/gradients` what it does to digits.
"""

# -- Blocks: what is copied, converted or compared at once, so that it stays in the cache. --

# Entries of a block on CPU: a mebibyte of float32. 2**17 and 2**19 are as fast, 2**16 pays for calls.
BLOCK = 2**18
# On a device, where a block only bounds the memory that comparing takes.
BLOCK_ON_DEVICE = 2**24
# Entries in which an entry outside the bounds is looked for, on CPU: a clipped step is known by the first few.
LOOK = 2**16

# -- Sums: how many entries go into one float32 sum, which sets the digits of a norm. --

# A row: even of equal entries, whose rounding errors all agree, 512 stay within 1e-6; 768 leave 1.1e-6.
ROW = 512
# A unit as timm and torch sum it, bit for bit: beyond this a float32 sum loses the sixth digit.
UNIT = 8192
# So many bfloat16 entries are read as they are, since the errors of many rows average out: see `norms`.
MANY_ROWS = 2**20

# -- Calls: from when on a call for each tensor costs less than what saves it. --

# Entries up to which copying a tensor among others costs less than a call for it: GPT-2 small, ResNet-50.
SMALL = 2**14
# So many tensors of one shape are worth a copy of their own: 2,000 tensors of 1,000 entries in 1 to 50 shapes.
ALIKE = 4
# Of a gradient with so many entries only the units that change are written, where they are no more than this share:
# a linear layer of 768 x 3072 at 1 to 50 % of its rows.
MANY, FEW = 2**19, 1 / 8
# So many tensors, of so few entries on average, GradScaler's foreach function multiplies in 0.7 (16 entries) to 0.87
# (1,000) of the product's time; fewer ones in the same, larger ones in up to 1.3: 1 to 2,000 tensors of 16 to 16,000.
MANY_SMALL, SMALL_ON_AVERAGE = 64, 2000
# Tensors that are looked at to know the average.
SAMPLE = 32
# Entries of a dtype on CUDA below which launching a kernel takes longer than multiplying them all. Reckoned from 3 TB/s
# and 10 us a launch, not measured.
LAUNCH = 2**22
# Entries that one program of the kernel works on, for the same reason; not measured either.
PROGRAM = 8192
