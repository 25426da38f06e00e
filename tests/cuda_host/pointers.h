// Global<T> and Shared<T> on the host: pointers that carry the bounds of their memory and check
// every access. Included by cuda_host.h alone.
#pragma once

namespace cuda_host {

template <class T>
class GlobalPointer {
 public:
  GlobalPointer() = default;
  GlobalPointer(std::nullptr_t) {}
  GlobalPointer(T* at, const void* begin, const void* end) : at_(at), begin_(begin), end_(end) {}
  template <class U, class = std::enable_if_t<std::is_convertible_v<U*, T*>>>
  GlobalPointer(const GlobalPointer<U>& other)
      : at_(other.raw()), begin_(other.begin()), end_(other.end()) {}

  // Checked accesses of any width; plain code goes through [].
  template <class V>
  V read(size_t align = sizeof(V)) const {
    check_global(at_, sizeof(V), begin_, end_, align, false);
    V value;
    std::memcpy(&value, at_, sizeof(V));
    return value;
  }
  template <class V>
  void write(const V& value) const {
    check_global(at_, sizeof(V), begin_, end_, sizeof(V), true);
    std::memcpy(const_cast<std::remove_const_t<T>*>(at_), &value, sizeof(V));
  }
  T& operator[](int64_t i) const {
    check_global(at_ + i, sizeof(T), begin_, end_, sizeof(T), !std::is_const_v<T>);
    return at_[i];
  }
  T& operator*() const { return (*this)[0]; }
  GlobalPointer operator+(int64_t i) const { return {at_ + i, begin_, end_}; }
  GlobalPointer operator-(int64_t i) const { return {at_ - i, begin_, end_}; }
  int64_t operator-(const GlobalPointer& other) const { return at_ - other.at_; }
  GlobalPointer& operator+=(int64_t i) {
    at_ += i;
    return *this;
  }
  GlobalPointer& operator-=(int64_t i) {
    at_ -= i;
    return *this;
  }
  explicit operator bool() const { return at_ != nullptr; }
  bool operator==(std::nullptr_t) const { return at_ == nullptr; }
  bool operator!=(std::nullptr_t) const { return at_ != nullptr; }
  T* raw() const { return at_; }
  const void* begin() const { return begin_; }
  const void* end() const { return end_; }

 private:
  T* at_ = nullptr;
  const void* begin_ = nullptr;
  const void* end_ = nullptr;
};

template <class T>
class SharedReference;

template <class T>
class SharedPointer {
 public:
  SharedPointer() = default;
  SharedPointer(T* at, const void* begin, const void* end) : at_(at), begin_(begin), end_(end) {}
  template <class U, class = std::enable_if_t<std::is_convertible_v<U*, T*>>>
  SharedPointer(const SharedPointer<U>& other)
      : at_(other.raw()), begin_(other.begin()), end_(other.end()) {}

  template <class V>
  V read() const {
    read_shared(at_, sizeof(V), begin_, end_, sizeof(V));
    V value;
    std::memcpy(&value, at_, sizeof(V));
    return value;
  }
  template <class V>
  void write(const V& value) const {
    write_shared(at_, sizeof(V), begin_, end_, sizeof(V));
    std::memcpy(at_, &value, sizeof(V));
  }
  SharedReference<T> operator[](int64_t i) const;
  SharedReference<T> operator*() const;
  SharedPointer operator+(int64_t i) const { return {at_ + i, begin_, end_}; }
  SharedPointer operator-(int64_t i) const { return {at_ - i, begin_, end_}; }
  SharedPointer& operator+=(int64_t i) {
    at_ += i;
    return *this;
  }
  T* raw() const { return at_; }
  const void* begin() const { return begin_; }
  const void* end() const { return end_; }

 private:
  T* at_ = nullptr;
  const void* begin_ = nullptr;
  const void* end_ = nullptr;
};

// What shared[i] is here: `auto x = shared[i]` would keep the reference, so write the type out.
template <class T>
class SharedReference {
 public:
  using Value = std::remove_const_t<T>;
  explicit SharedReference(SharedPointer<T> at) : at_(at) {}
  operator Value() const { return at_.template read<Value>(); }
  const SharedReference& operator=(Value value) const {
    at_.write(value);
    return *this;
  }
  const SharedReference& operator=(const SharedReference& other) const {
    return *this = static_cast<Value>(other);
  }
  const SharedReference& operator+=(Value value) const {
    return *this = static_cast<Value>(*this) + value;
  }
  const SharedReference& operator*=(Value value) const {
    return *this = static_cast<Value>(*this) * value;
  }

 private:
  SharedPointer<T> at_;
};

template <class T>
SharedReference<T> SharedPointer<T>::operator[](int64_t i) const {
  return SharedReference<T>(*this + i);
}
template <class T>
SharedReference<T> SharedPointer<T>::operator*() const {
  return SharedReference<T>(*this);
}

template <class T>
SharedPointer<T> shared_array(const void* key, size_t count) {
  T* at = static_cast<T*>(static_shared(key, count * sizeof(T), std::max<size_t>(16, alignof(T))));
  return {at, at, at + count};
}
template <class T>
SharedPointer<T> shared_dynamic() {
  char* at = static_cast<char*>(dynamic_shared());
  return {reinterpret_cast<T*>(at), at, at + dynamic_shared_bytes()};
}

}  // namespace cuda_host

template <class T>
using Global = cuda_host::GlobalPointer<T>;
template <class T>
using Shared = cuda_host::SharedPointer<T>;
