// The sampler on the device. Every operation rounds exactly as engines/sampler.py and engines/loop.py do
// with numpy: each product and sum by itself (the _rn intrinsics are never contracted into an FMA), in the
// same order and precision. tools/release/compile_kernels.py compiles this file to kernels.ptx; no header is needed.

struct Term {
    const float* values;
    double coefficient;
};

__device__ unsigned short to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ float from_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ void store(void* target, long long index, float value, int half) {
    if (half)
        static_cast<unsigned short*>(target)[index] = to_half(value);
    else
        static_cast<float*>(target)[index] = value;
}

__device__ float load(const void* source, long long index, int half) {
    return half ? from_half(static_cast<const unsigned short*>(source)[index]) : static_cast<const float*>(source)[index];
}

__device__ long long first_index() {
    return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ long long stride() {
    return static_cast<long long>(gridDim.x) * blockDim.x;
}

// model_latents [copies, size] = float32(float64(latents [size]) * scale); model_timestep [copies * samples] = timestep
extern "C" __global__ void tmpdiff_model_input(
    const float* latents, double scale, long long size, int copies, void* model_latents, int latents_half,
    float timestep, int samples, void* model_timestep, int timestep_half
) {
    for (long long i = first_index(); i < size; i += stride()) {
        const float value = static_cast<float>(__dmul_rn(static_cast<double>(latents[i]), scale));
        for (int copy = 0; copy < copies; ++copy)
            store(model_latents, copy * size + i, value, latents_half);
    }
    for (long long i = first_index(); i < static_cast<long long>(copies) * samples; i += stride())
        store(model_timestep, i, timestep, timestep_half);
}

// guided: output [size] = uncond + guidance_scale * (cond - uncond) of model_output [2, size], in float32;
// otherwise output [size] = float32(model_output [size])
extern "C" __global__ void tmpdiff_guide(
    const void* model_output, int half, long long size, int guided, float guidance_scale, float* output
) {
    for (long long i = first_index(); i < size; i += stride()) {
        float value = load(model_output, i, half);
        if (guided) {
            const float difference = __fsub_rn(load(model_output, size + i, half), value);
            value = __fadd_rn(value, __fmul_rn(guidance_scale, difference));
        }
        output[i] = value;
    }
}

// next [size] = float32(sum of terms in their order), accumulated in float64 from zero
extern "C" __global__ void tmpdiff_combine(const Term* terms, int count, long long size, float* next) {
    for (long long i = first_index(); i < size; i += stride()) {
        double total = 0.0;
        for (int term = 0; term < count; ++term)
            total = __dadd_rn(total, __dmul_rn(static_cast<double>(terms[term].values[i]), terms[term].coefficient));
        next[i] = static_cast<float>(total);
    }
}
