// Runs one engine of a torch bundle without Python: an AOTInductor package with its weights beside it.
//
//     run_package PACKAGE.pt2 WEIGHTS.safetensors... INPUTS.safetensors OUTPUTS.bin [cuda]
//
// Whole packages only: an engine that was compiled in blocks (`build --compile blocks`) is several packages, PACKAGE.pt2
// and PACKAGE.1.pt2 and so on, which the manifest's `calls` put together. Such an engine is refused.
//
// WEIGHTS are the files that the manifest lists as the engine's `weights`, one or several. The package takes the tensors
// of all of them first, in the order of their names, then its inputs in the order of the manifest, which
// INPUTS holds under the names "0", "1" and so on, in the shapes that the package was compiled for. OUTPUTS receives the
// outputs one after the other, as they lie in memory. docs/torch.md says how to compile this file. Check the hashes in
// manifest.json before you load a package: it is machine code.

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

namespace {

const std::map<std::string, at::ScalarType> kTypes = {
    {"F32", at::kFloat},         {"F16", at::kHalf}, {"BF16", at::kBFloat16}, {"I64", at::kLong}, {"U8", at::kByte},
    {"F8_E4M3", at::kFloat8_e4m3fn}, {"I8", at::kChar},
};

std::vector<std::string> fields(const std::string& list) {
  std::vector<std::string> found;
  std::stringstream stream(list);
  for (std::string item; std::getline(stream, item, ',');) found.push_back(item);
  return found;
}

using Tensors = std::map<std::string, at::Tensor>;  // by name, and in the order of the names

// Adds the tensors of a safetensors file. The header is one JSON object per tensor: dtype, shape, data_offsets.
void read_tensors(const std::string& path, at::Device device, Tensors& tensors) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " cannot be read");
  uint64_t length = 0;  // little-endian, as every machine that runs packages is
  file.read(reinterpret_cast<char*>(&length), sizeof length);
  std::string header(length, '\0');
  file.read(header.data(), static_cast<std::streamsize>(length));
  const std::streamoff start = static_cast<std::streamoff>(sizeof length + length);
  const std::regex entry(
      R"re("([^"]+)":\{"dtype":"([^"]+)","shape":\[([0-9,]*)\],"data_offsets":\[([0-9]+),([0-9]+)\]\})re");
  for (std::sregex_iterator match(header.begin(), header.end(), entry), end; match != end; ++match) {
    const std::smatch& part = *match;
    const auto type = kTypes.find(part[2]);
    if (type == kTypes.end()) throw std::runtime_error(path + ": unknown dtype " + part[2].str());
    std::vector<int64_t> shape;
    for (const std::string& size : fields(part[3])) shape.push_back(std::stoll(size));
    at::Tensor tensor = torch::empty(shape, type->second);
    const std::streamoff begin = std::stoll(part[4]), stop = std::stoll(part[5]);
    if (static_cast<std::streamoff>(tensor.nbytes()) != stop - begin)
      throw std::runtime_error(path + ": " + part[1].str() + " has another size than its shape");
    file.seekg(start + begin);
    file.read(static_cast<char*>(tensor.data_ptr()), stop - begin);
    if (!file) throw std::runtime_error(path + " ends early");
    if (!tensors.emplace(part[1], tensor.to(device)).second)
      throw std::runtime_error(path + ": " + part[1].str() + " is in another file too");
  }
}

// Refuses a package that is a part of an engine: the others lie beside it.
void require_whole(const std::filesystem::path& package) {
  std::filesystem::path stem = package.parent_path() / package.stem();  // "fp16" or, of another part, "fp16.2"
  if (std::regex_match(stem.extension().string(), std::regex("\\.[0-9]+"))) stem.replace_extension();
  if (std::filesystem::exists(stem.string() + ".1.pt2"))
    throw std::runtime_error(package.string() + " is one of several packages that make up an engine, expected a whole "
                             "one; build the bundle with --compile whole");
}

// How many tensors a package takes: the leaves of the tree of its arguments, which it holds as JSON.
size_t arguments_of(torch::inductor::AOTIModelPackageLoader& loader) {
  const std::string tree = loader.get_call_spec().at(0);
  const std::regex leaf(R"re("type":\s*null)re");
  return static_cast<size_t>(std::distance(std::sregex_iterator(tree.begin(), tree.end(), leaf), std::sregex_iterator()));
}

int run(int count, char** words) {
  const bool cuda = count > 1 && std::strcmp(words[count - 1], "cuda") == 0;
  if (cuda) --count;
  if (count < 5) {
    std::cerr << "usage: run_package PACKAGE.pt2 WEIGHTS.safetensors... INPUTS.safetensors OUTPUTS.bin [cuda]\n"
                 "PACKAGE.pt2 is a whole engine; engines that were compiled in blocks are refused\n";
    return 2;
  }
  require_whole(words[1]);
  c10::InferenceMode inference;
  const at::Device device = cuda ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU);
  Tensors weights, inputs;
  for (int position = 2; position < count - 2; ++position) read_tensors(words[position], device, weights);
  read_tensors(words[count - 2], device, inputs);
  std::vector<at::Tensor> arguments;
  for (const auto& [name, tensor] : weights) arguments.push_back(tensor);
  for (size_t position = 0; position < inputs.size(); ++position)
    arguments.push_back(inputs.at(std::to_string(position)));
  torch::inductor::AOTIModelPackageLoader loader(words[1]);
  if (const size_t taken = arguments_of(loader); taken != arguments.size())
    throw std::runtime_error(std::string(words[1]) + " takes " + std::to_string(taken) + " tensors, received " +
                             std::to_string(arguments.size()) + "; name all weight files and inputs of a whole engine");
  std::ofstream target(words[count - 1], std::ios::binary);
  for (const at::Tensor& output : loader.run(arguments)) {
    const at::Tensor plain = output.cpu().contiguous();
    target.write(static_cast<const char*>(plain.data_ptr()), static_cast<std::streamsize>(plain.nbytes()));
    std::cout << plain.toString() << ' ' << plain.sizes() << '\n';
  }
  return target.good() ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
  try {
    return run(count, words);
  } catch (const std::exception& error) {
    std::cerr << "run_package: " << error.what() << '\n';
    return 1;
  }
}
